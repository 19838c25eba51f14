"""New blocks in a live stack: what must follow, how a block is made, how it is put in and taken out, tried on a twin."""

from peftlab.insertion.new_blocks import GATE, MARK
from peftlab.insertion.new_layers import NewLayers, chosen_stacks
from peftlab.insertion.stack_facts import configs_of

__all__ = ["GATE", "MARK", "NewLayers", "chosen_stacks", "configs_of"]
