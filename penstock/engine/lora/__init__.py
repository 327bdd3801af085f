"""LoRA adapters: PEFT folders in, weights for the kernels out; names, versions, memory and slots.

```
registry   name -> version (a content hash), by operators' orders
store      version -> weights in memory, least recently used out; a thread reads folders
slots      which versions the running requests use; pure, the scheduler's
adapter    one folder, checked
```

`engine/core` joins them. What an adapter computes is in `kernels`.
"""
