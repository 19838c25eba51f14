"""Several runs over one frozen base: each pass goes once through the shared products, each run keeps all that is its own.

`adapters` puts the runs' adapters on one base and has each adapted layer compute its base once (`layers`); `shares` says
which part of a joint batch is whose, `streams` gives each run its own random draws there; `losses` gives each run its own
loss; `training` has the runs' own trainers meet at each pass (`meeting`).
"""
