"""Token ids in, token ids out: scheduler, KV blocks, runner and sampler around one step loop.

It knows neither text nor HTTP. `text/service` and `cli` call it through `EngineClient`.
"""
