"""The snippets of the efficient fine-tuning document about comparisons, optimisation, choice of method, grids, metrics."""

from __future__ import annotations

from dataclasses import replace

from documents import Snippet
from documents_s4_examples import IMPORTS, SMALL_MODEL, TRAINED, TRAINING

COUNTS = Snippet(
    text="""# Base model parameters
base_parameters = 100_000_000  # 100M parameters

# Efficient fine-tuning parameters
lora_parameters = 1_000_000    # 1M parameters (1%)
ptuning_parameters = 500_000   # 0.5M parameters (0.5%)
adalora_parameters = 800_000   # 0.8M parameters (0.8%)
prefix_parameters = 200_000    # 0.2M parameters (0.2%)

# Efficiency percentages
lora_efficiency = lora_parameters / base_parameters * 100      # 1.0%
ptuning_efficiency = ptuning_parameters / base_parameters * 100 # 0.5%
adalora_efficiency = adalora_parameters / base_parameters * 100 # 0.8%
prefix_efficiency = prefix_parameters / base_parameters * 100   # 0.2%""",
    differences=(),
    before=IMPORTS,
    after="""
found = (lora_efficiency, ptuning_efficiency, adalora_efficiency, prefix_efficiency)
assert [round(x, 3) for x in found] == [1, 0.5, 0.8, 0.2]
""",
)

MEMORY = Snippet(
    text="""# Memory usage for different methods
# Assuming 4 bytes per parameter (float32)

base_memory = base_parameters * 4 / (1024**3)      # ~0.37 GB
lora_memory = lora_parameters * 4 / (1024**3)      # ~0.004 GB
ptuning_memory = ptuning_parameters * 4 / (1024**3) # ~0.002 GB
adalora_memory = adalora_parameters * 4 / (1024**3) # ~0.003 GB
prefix_memory = prefix_parameters * 4 / (1024**3)   # ~0.001 GB""",
    differences=(),
    before=COUNTS.text,
    after="""
assert [round(x, 3) for x in (base_memory, lora_memory, ptuning_memory, adalora_memory, prefix_memory)] == [
    0.373, 0.004, 0.002, 0.003, 0.001
]
""",
)

CHECKPOINTING = Snippet(
    text="""# Enable gradient checkpointing for memory efficiency
model.gradient_checkpointing_enable()

# Or for specific modules
for module in model.modules():
    if hasattr(module, 'gradient_checkpointing'):
        module.gradient_checkpointing = True""",
    differences=(),
    before=IMPORTS
    + """
import warnings
import tiny_models
warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
def gradients():
    inputs = tiny_models.training_inputs("llama")
    model.train()(**inputs).loss.backward()
    found = [p.grad.clone() for p in manager.get_trainable_parameters()]
    model.zero_grad()
    return found
model = tiny_models.build("llama")
manager = apply_lora_to_model(model, target_modules=["q_proj", "down_proj"], dropout_probability=0.0)
for layer in manager.lora_layers.values():
    nn.init.normal_(layer.lora_B["default"].weight)
whole = gradients()
""",
    after="""
assert model.model.layers[0].gradient_checkpointing
calls = []
model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
for own, other in zip(gradients(), whole, strict=True):
    assert own.any()
    torch.testing.assert_close(own, other)
assert len(calls) == 2, "computed again in the backward pass"
""",
)

MIXED_PRECISION = Snippet(
    text="""from torch.cuda.amp import autocast, GradScaler

# Initialize scaler
scaler = GradScaler()

# Training with mixed precision
for batch in dataloader:
    with autocast():
        outputs = model(batch['input_ids'])
        loss = criterion(outputs, batch['labels'])

    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()""",
    differences=(
        ("from torch.cuda.amp", "from torch.amp", "torch has moved them"),
        ("GradScaler()", 'GradScaler("cpu")', "there is no GPU where the tests run"),
        ("with autocast():", 'with autocast("cpu"):', "there is no GPU where the tests run"),
    ),
    before=IMPORTS
    + TRAINING
    + SMALL_MODEL
    + """
manager = apply_lora_to_model(model, target_modules=["attention", "mlp"])
trainable_parameters = manager.get_trainable_parameters()
optimizer = torch.optim.AdamW(trainable_parameters, lr=1e-2)
""",
    after="""
"""
    + TRAINED
    + """
assert outputs.dtype == torch.bfloat16 and {p.dtype for p in trainable_parameters} == {torch.float32}
assert all(layer.lora_B["default"].weight.any() for layer in manager.lora_layers.values())
""",
)

SHARING = Snippet(
    text="""# Share LoRA parameters across layers
shared_lora = LoRALayer(input_dim=768, output_dim=768, rank=8)

# Apply to multiple layers
for name, module in model.named_modules():
    if "attention" in name:
        module.lora_layer = shared_lora""",
    differences=(
        (
            "input_dim=768, output_dim=768",
            "input_dimension=768, output_dimension=768",
            "the document calls them so everywhere else",
        ),
        (
            "model.named_modules():",
            "list(model.named_modules()):",
            "the loop would walk into what it adds, and put the LoRA into itself",
        ),
    ),
    before=IMPORTS
    + """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection, self.lora_layer = nn.Linear(768, 768), None

    def forward(self, x):
        return self.projection(x) + (0 if self.lora_layer is None else self.lora_layer(x))

model = nn.ModuleDict({"first_attention": Attention(), "second_attention": Attention()})
manager = peftlab.create_efficient_finetuning_manager(model)
""",
    after="""
assert model["first_attention"].lora_layer is model["second_attention"].lora_layer is shared_lora
assert manager.count_trainable_parameters() == 8 * (768 + 768), "counted once"
model["second_attention"](model["first_attention"](torch.randn(2, 768))).sum().backward()
assert shared_lora.lora_B["default"].weight.grad.any()
manager.save_efficient_weights("shared.safetensors")
from safetensors.torch import load_file
assert sum(t.numel() for t in load_file("shared.safetensors").values()) == 8 * (768 + 768), "saved once"
""",
)

GUIDE = Snippet(
    text="""# Choose method based on requirements:

# LoRA: Good for most tasks, balanced performance/efficiency
if task_type == "general":
    method = "lora"
    rank = 8
    alpha = 16.0

# P-tuning: Good for language tasks, minimal parameters
elif task_type == "language":
    method = "ptuning"
    num_virtual_tokens = 20

# AdaLoRA: Good for complex tasks, adaptive efficiency
elif task_type == "complex":
    method = "adalora"
    rank = 8
    adaptive_rank = True

# Prefix tuning: Good for generation tasks, very efficient
elif task_type == "generation":
    method = "prefix"
    prefix_length = 20""",
    differences=(),
    before=IMPORTS,
    after="""
advice = recommend(task_type)
assert advice.method == method
assert all(globals()[name] == value for name, value in advice.settings.items())
""",
)

GRIDS = Snippet(
    text="""# LoRA hyperparameters
lora_configs = {
    "rank": [4, 8, 16, 32],
    "alpha": [8, 16, 32, 64],
    "dropout": [0.0, 0.1, 0.2]
}

# P-tuning hyperparameters
ptuning_configs = {
    "num_virtual_tokens": [10, 20, 50, 100],
    "hidden_dimension": [256, 512, 1024]
}

# AdaLoRA hyperparameters
adalora_configs = {
    "rank": [4, 8, 16],
    "adaptive_rank": [True, False],
    "rank_allocation": ["uniform", "importance", "magnitude"]
}""",
    differences=(),
    before=IMPORTS,
    after="""
from itertools import product
for rank, alpha, dropout in product(*lora_configs.values()):
    layer = LoRALayer(8, 8, rank=rank, alpha=alpha, dropout_probability=dropout)
    assert layer.scaling["default"] == alpha / rank
for tokens, hidden in product(*ptuning_configs.values()):
    assert peftlab.PTuningEmbedding(tokens, 8, hidden)(2).shape == (2, tokens, 8)
for rank, adaptive, allocation in product(*adalora_configs.values()):
    assert peftlab.AdaLoRALayer(8, 8, rank=rank, adaptive_rank=adaptive, rank_allocation=allocation).r["default"] == rank
""",
)

METRICS = Snippet(
    text="""# Parameter efficiency
parameter_efficiency = trainable_parameters / total_parameters

# Memory efficiency
memory_efficiency = trainable_memory / total_memory

# Training speed
training_speed = time_per_epoch

# Model performance
model_performance = evaluation_metrics

# Combined efficiency score
efficiency_score = (parameter_efficiency * 0.4 +
                   memory_efficiency * 0.3 +
                   training_speed * 0.2 +
                   model_performance * 0.1)""",
    differences=(),
    before=IMPORTS
    + """
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
manager = apply_lora_to_model(model, ["0"])
trainable_parameters, total_parameters = manager.count_trainable_parameters(), sum(p.numel() for p in model.parameters())
trainable_memory, total_memory = 4 * trainable_parameters, 4 * total_parameters
time_per_epoch, evaluation_metrics = 1.0, 0.5
""",
    after="""
assert 0 < parameter_efficiency == memory_efficiency < 1
# The sum counts slow epochs and many parameters as good; it runs, and nothing here uses it. The mended one:
full = peftlab.Measured(total_parameters, total_memory, 2 * time_per_epoch, evaluation_metrics)
lora = peftlab.Measured(trainable_parameters, trainable_memory, time_per_epoch, evaluation_metrics)
found = peftlab.score_efficiency(lora, full)
assert found.parameter_efficiency == found.memory_efficiency > found.training_speed > found.model_performance == 0.5
assert peftlab.score_efficiency(full, full).efficiency_score == 0.5 < found.efficiency_score < 1
""",
)

SNIPPETS = {
    "counts": COUNTS,
    "memory": MEMORY,
    "checkpointing": CHECKPOINTING,
    "mixed_precision": MIXED_PRECISION,
    "sharing": SHARING,
    **{
        f"guide_{task_type}": replace(GUIDE, before=f"{IMPORTS}\ntask_type = '{task_type}'")
        for task_type in ("general", "language", "complex", "generation")
    },
    "grids": GRIDS,
    "metrics": METRICS,
}
