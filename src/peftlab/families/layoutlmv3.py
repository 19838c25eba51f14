"""LayoutLMv3: a document's words without its picture."""

TWIN = {"visual_embed": False, "coordinate_size": 8, "shape_size": 16}
