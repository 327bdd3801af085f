"""Text to tokens and back: tokenizer, incremental detokenizer, chat templates, stop strings, text service.

`service.py` turns the lower waist (`EngineClient`, token ids) into the upper one (`ModelClient`, text),
once, for every dialect. It knows nothing of HTTP, tenants' limits or how tokens are computed. Built by
`cli`, called by `server` and the offline API through the ports in `core`.
"""
