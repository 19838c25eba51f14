"""Memory: what a training step takes, whether it fits, and how large a batch may be, before a weight is read.

`prediction` predicts by carrying a run's first `steps` out on tensors without data (`rehearsal`) and keeping an account
of their storages (`ledger`, `kernels`); `measuring` and `peaks` measure the same steps with data; `fitting` answers whether
they fit a `budget` and finds what does by `search`; `placement` divides a model that fits no single device;
`checkpointing` shows what gradient checkpointing saves on a loaded model; `holders` names who keeps a model alive.
"""
