"""Ask a quantized checkpoint a question: `python examples/quantized_checkpoint.py FOLDER_OR_FILE.gguf`."""

import sys

from penstock import LLM, SamplingParams

with LLM(sys.argv[1], max_num_seqs=4, max_model_len=256) as llm:
    print("weights:", llm.info.quantization)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    print("answer:", llm.chat(question, SamplingParams(temperature=0.0, max_tokens=32))[0].outputs[0].text)
