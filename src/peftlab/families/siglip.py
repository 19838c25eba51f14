"""SigLIP: the text's projection has the hidden width of the picture's."""

TWIN = {"text_config": {"projection_size": 64}}
