"""The same answer in fewer steps: `python examples/speculation.py`."""

from penstock import LLM, SamplingParams

record = "Red 12, green 7, blue 31, red 12, green 8, blue 30, red 12, green 7, blue 32."
question = [{"role": "user", "content": f"Repeat exactly: {record}"}]
params = SamplingParams(temperature=0.0, max_tokens=96)
answers = []
for config in (None, {"method": "ngram"}, {"method": "draft_model", "model": "embedded"}):
    with LLM(max_num_seqs=4, max_model_len=512, speculative_config=config) as llm:
        output = llm.chat(question, params, use_tqdm=False)[0].outputs[0]
        answers.append(output.token_ids)
        print(f"{config}: {len(output.token_ids)} tokens in {llm.totals.num_steps} steps")
print("same answer:", answers[0] == answers[1] == answers[2])
