"""What each idea of serving is worth: one model, one run, the same users over HTTP, one rung after another.

`rungs` says what stands on each rung and how it is started, `naive_server` is the two lowest (transformers'
own `generate` behind HTTP, one request at a time or in static batches), `gauges` reads a server's metrics
while it works, `climb` runs the rungs, `report` makes table
and picture.
"""
