"""One function per operation: `ops` is the contract, `registry` picks the home that runs it."""
