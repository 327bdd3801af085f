"""OpenAI's dialect: chat completions, completions, models, and vLLM's tokenize and detokenize.

Pydantic models describe the wire, conversion to domain types happens here and nowhere else. A field is
honoured, or refused by its name; none is accepted and ignored.
"""
