"""A pool of few blocks and host memory behind it: a prompt that was evicted comes back by a copy."""

from penstock import LLM, SamplingParams

PROMPTS = [f"Chapter {number}. Once upon a time there was a fox who " for number in range(1, 9)]
PARAMS = SamplingParams(temperature=0, max_tokens=24)

with LLM(max_model_len=128, num_kv_blocks=12, kv_offloading_size=0.25) as llm:
    first = [llm.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].text for prompt in PROMPTS]
    again = [llm.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].text for prompt in PROMPTS]
    print("the same answers:", first == again)
    print("tokens that came back from host memory:", llm.totals.num_offload_hit_tokens)
