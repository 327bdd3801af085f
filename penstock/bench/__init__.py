"""Measures: load on a server over HTTP, and (in modules of their own) the engine and the kernels.

The load half reads top to bottom: `arrivals`, `lengths` and `trace` say when and how much; `prompts` and
`workload` make the requests; `target` names the server; `client` sends one request; `load` sends them all
(`run_load`, the entry for other benchmarks); `measure` and `slo` turn records into figures; `progress`,
`report` and `plots` show them; `serve` and `sweep` are the commands. It never imports torch, and needs
aiohttp, msgspec and numpy only. Not the simulator (`sim`), which runs without a server and without time.
"""
