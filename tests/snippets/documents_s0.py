"""The snippets of the model extensions document, as they stand there, and what must differ to run.

Two of the four show how the code was before the extensions; they run too, on transformers, peft and what they leave out.
"""

from __future__ import annotations

from documents import Snippet

TWO_NAMES = "the document writes two classes' methods under one name: the first is kept under its class's"
LEFT_OUT = "the document leaves arguments out; three dots behind a named argument are no Python"

SETTING = """
import logging
import torch
import tiny_models
from copy import deepcopy
from types import SimpleNamespace
from peftlab import ExtensionConfig, HybridExtension, LoRAExtension, TransformerLayerExtension

base = tiny_models.build("t5")
batch = tiny_models.training_inputs("t5")
given = {name: tensor.clone() for name, tensor in base.state_dict().items()}

def _train_model(model, train_data, epochs, batch_size):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(epochs):
        optimizer.zero_grad()
        model(**train_data).loss.backward()
        optimizer.step()
    return 0.5

def same(one, other):
    return torch.equal(one(**batch).logits, other(**batch).logits)

def base_is_kept():
    return all(torch.equal(tensor, given[name]) for name, tensor in base.state_dict().items())
"""
BEFORE = (
    SETTING
    + """
from peft import LoraConfig, get_peft_model

def add_trainable_transformer_layer(model):
    return TransformerLayerExtension(model, ExtensionConfig()).add_layer("before")

"""
)

LEARNERS_BEFORE = Snippet(
    text="""# LoRAContinualLearner - 45 lines of LoRA setup code
def train_task(self, train_data, task_name: str, epochs: int = 5, batch_size: int = 16):
    model = deepcopy(self.base_model)
    lora_config = LoraConfig(r=16, lora_alpha=32, ...)  # 10 lines
    model = get_peft_model(model, lora_config)
    # ... training and saving logic (20+ lines)

# FullLayerContinualLearner - 35 lines of layer addition code
def train_task(self, train_data, task_name: str, epochs: int = 5, batch_size: int = 16):
    model = add_trainable_transformer_layer(self.base_model)  # 50+ line function
    # ... training and saving logic""",
    differences=(
        (
            "lora_alpha=32, ...)",
            'lora_alpha=32, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")',
            LEFT_OUT,
        ),
        (
            "# FullLayerContinualLearner",
            "train_lora_task = train_task\n\n# FullLayerContinualLearner",
            TWO_NAMES,
        ),
    ),
    before=BEFORE,
    after="""
learner = SimpleNamespace(base_model=base)
assert train_lora_task(learner, batch, "python") is train_task(learner, batch, "python") is None
assert base_is_kept()
""",
)
LEARNERS = Snippet(
    text="""# LoRAContinualLearner - 8 lines total
def train_task(self, train_data, task_name: str, epochs: int = 5, batch_size: int = 16):
    model = self.lora_extension.create_adapter(task_name)
    training_time = self._train_model(model, train_data, epochs, batch_size)
    self.lora_extension.save_adapter(model, task_name)
    return training_time

# FullLayerContinualLearner - 10 lines total
def train_task(self, train_data, task_name: str, epochs: int = 5, batch_size: int = 16):
    model = self.layer_extension.add_layer(task_name)
    # ... training logic (unchanged)""",
    differences=(
        (
            "# FullLayerContinualLearner",
            "train_lora_task = train_task\n\n# FullLayerContinualLearner",
            TWO_NAMES,
        ),
    ),
    before=SETTING,
    after="""
learner = SimpleNamespace(
    lora_extension=LoRAExtension(base, ExtensionConfig(lora_r=2)),
    layer_extension=TransformerLayerExtension(base, ExtensionConfig()),
    _train_model=_train_model,
)
assert train_lora_task(learner, batch, "python") == 0.5
assert train_lora_task(learner, batch, "javascript", 2) == 0.5
assert learner.lora_extension.list_adapters() == ["javascript", "python"]  # below adapters/, where the program runs
python, javascript = (learner.lora_extension.load_adapter(task) for task in ("python", "javascript"))
assert not same(python, javascript) and not same(python, base)
train_task(learner, batch, "python")
assert base_is_kept()
""",
)
HYBRID_BEFORE = Snippet(
    text="""# 65 lines of complex hybrid model creation
def create_hybrid_model(self, base_model, task_name: str, use_shared_layer: bool = False):
    if use_shared_layer:
        model_with_layer = deepcopy(shared_layer_model)
    else:
        model_with_layer = add_trainable_transformer_layer(base_model)  # 50+ lines

    # LoRA configuration and application (15 lines)
    lora_config = LoraConfig(...)
    hybrid_model = get_peft_model(model_with_layer, lora_config)

    # Complex parameter re-enabling logic (25 lines)
    for name, param in hybrid_model.named_parameters():
        if f'encoder.block.{new_layer_idx}' in name and not param.requires_grad:
            param.requires_grad = True
    # ... parameter counting and validation""",
    differences=(
        (
            "LoraConfig(...)",
            'LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")',
            LEFT_OUT,
        ),
    ),
    before=BEFORE + "new_layer_idx = 2\nshared_layer_model = add_trainable_transformer_layer(base)\n",
    after="""
for shared in (False, True):
    assert create_hybrid_model(None, base, "python", use_shared_layer=shared) is None
assert base_is_kept()
""",
)
HYBRID = Snippet(
    text="""# 12 lines total
def create_hybrid_model(self, base_model, task_name: str, use_shared_layer: bool = False):
    if use_shared_layer and shared_layer_model is not None:
        hybrid_model = self.hybrid_extension.create_hybrid_from_existing(shared_layer_model, task_name)
    else:
        hybrid_model = self.hybrid_extension.create_hybrid(task_name)

    trainable_params = sum(p.numel() for p in hybrid_model.parameters() if p.requires_grad)
    log_message(f"Hybrid model created: {trainable_params:,} trainable parameters")
    return hybrid_model""",
    differences=(),
    before=SETTING
    + """
said = []
logging.getLogger("peftlab").setLevel(logging.INFO)
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("peftlab").addHandler(handler)
told = []
log_message = told.append
shared_layer_model = TransformerLayerExtension(base, ExtensionConfig()).add_layer("python")
""",
    after="""
learner = SimpleNamespace(hybrid_extension=HybridExtension(base, ExtensionConfig(lora_r=2)))
own = create_hybrid_model(learner, base, "python")
shared = create_hybrid_model(learner, base, "javascript", use_shared_layer=True)
logging.getLogger("peftlab").removeHandler(handler)
logging.getLogger("peftlab").setLevel(logging.NOTSET)
assert told[0] == told[1] and set(told) <= set(said)  # the extension says the document's very line
layer = {p.data_ptr() for p in shared_layer_model.parameters() if p.requires_grad}
assert layer <= {p.data_ptr() for p in shared.parameters() if p.requires_grad}
assert not layer & {p.data_ptr() for p in own.parameters()}
_train_model(own, batch, 2, 2), _train_model(shared, batch, 2, 2)
assert base_is_kept()
""",
)
SNIPPETS = {
    "learners_before": LEARNERS_BEFORE,
    "learners": LEARNERS,
    "hybrid_before": HYBRID_BEFORE,
    "hybrid": HYBRID,
}
"""Name to snippet, in the document's order."""
