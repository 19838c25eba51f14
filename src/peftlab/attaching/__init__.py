"""Methods carried out on a live base: what a leaf of `methods/` attaches, and what the attachments share."""
