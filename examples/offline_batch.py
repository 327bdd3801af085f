"""Answer prompts without a server: `python examples/offline_batch.py`."""

from penstock import LLM, SamplingParams

prompts = ["Once upon a time", "The king said to his daughter", "In the middle of the wood"]

with LLM(max_num_seqs=8, max_model_len=512) as llm:
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=24)
    for output in llm.generate(prompts, params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    print("chat:", llm.chat(question, SamplingParams(temperature=0.0, max_tokens=32))[0].outputs[0].text)
