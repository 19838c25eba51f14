"""The snippets of the efficient fine-tuning document about its layers and its manager, and what must differ to run.

Each has the smallest difference that makes it run, with its reason; `documents_s4_examples.py` and
`documents_s4_practices.py` have the others.
"""

from __future__ import annotations

from documents import Snippet

IMPORTS = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from peftlab import AdaLoRALayer, LoRALayer, LoRALinear, PrefixTuning, PTuningEmbedding
"""
ONE_ADAPTER = "a layer has one adapter: two low-rank updates of one layer are refused"
MANAGED = """
from peftlab import EfficientFineTuningManager
import warnings
warnings.filterwarnings("ignore", message="no adapter dropout")  # said aloud: attention never calls its out_proj

class SimpleModel(nn.Module):
    def __init__(self, layers):
        super().__init__()
        layer = nn.TransformerEncoderLayer(768, 12, dim_feedforward=64, batch_first=True)
        self.embedding = nn.Embedding(50, 768)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(768, 10)

    def forward(self, input_ids):
        return self.output(self.transformer(self.embedding(input_ids)))
"""

LORA = Snippet(
    text="""# Create LoRA layer
lora_layer = LoRALayer(
    input_dimension=768,
    output_dimension=768,
    rank=8,
    alpha=16.0,
    dropout_probability=0.1,
    bias=False
)

# Create LoRA linear layer
original_layer = nn.Linear(768, 768)
lora_linear = LoRALinear(
    original_layer=original_layer,
    rank=8,
    alpha=16.0,
    dropout_probability=0.1,
    bias=False
)

# Forward pass
input_tensor = torch.randn(2, 10, 768)
output = lora_linear(input_tensor)""",
    differences=(),
    before=IMPORTS,
    after="""
assert output.shape == (2, 10, 768)
assert torch.equal(output, original_layer(input_tensor)), "no effect at the start"
assert not lora_layer(input_tensor).any()
assert sum(p.numel() for p in lora_linear.parameters() if p.requires_grad) == 8 * (768 + 768)
assert not original_layer.weight.requires_grad
""",
)

LORA_MATHEMATICS = Snippet(
    text="""# LoRA decomposition: W = W_0 + α/r * (B * A)
# Where:
# - W_0: Original weight matrix (frozen)
# - A: Low-rank matrix A (rank × input_dim)
# - B: Low-rank matrix B (output_dim × rank)
# - α: Scaling factor
# - r: Rank of the adaptation

# Forward computation
lora_output = torch.matmul(input, A.T)  # (batch, seq, rank)
lora_output = torch.matmul(lora_output, B.T)  # (batch, seq, output_dim)
lora_output = lora_output * (alpha / rank)  # Scaling
final_output = original_output + lora_output  # Residual connection""",
    differences=(),
    before=IMPORTS
    + """
layer = LoRALinear(nn.Linear(12, 6), rank=4, alpha=8.0).eval()
A, B, alpha, rank = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 8.0, 4
nn.init.normal_(B)
input = torch.randn(2, 5, 12)
original_output = layer.original_layer(input)
""",
    after="""
torch.testing.assert_close(layer(input), final_output)
""",
)

PTUNING = Snippet(
    text="""# Create P-tuning embeddings
ptuning_embeddings = PTuningEmbedding(
    num_virtual_tokens=20,
    embedding_dimension=768,
    hidden_dimension=512,
    dropout_probability=0.1
)

# Generate virtual tokens
batch_size = 4
virtual_tokens = ptuning_embeddings(batch_size)
# Shape: (batch_size, num_virtual_tokens, embedding_dimension)

# Concatenate with input embeddings
# input_embeddings: (batch_size, seq_len, embedding_dim)
# combined_embeddings = torch.cat([virtual_tokens, input_embeddings], dim=1)""",
    differences=(),
    before=IMPORTS,
    after="""
assert virtual_tokens.shape == (batch_size, 20, 768)
assert sum(p.numel() for p in ptuning_embeddings.parameters()) == 804_608
""",
)

PTUNING_ARCHITECTURE = Snippet(
    text="""# P-tuning process:
# 1. Initialize virtual token embeddings
# 2. Apply MLP transformation: MLP(virtual_embeddings)
# 3. Apply layer normalization
# 4. Concatenate with input embeddings
# 5. Pass through transformer layers

class PTuningEmbedding(nn.Module):
    def __init__(self, num_virtual_tokens, embedding_dimension, hidden_dimension):
        super().__init__()
        self.virtual_embeddings = nn.Parameter(torch.randn(num_virtual_tokens, embedding_dimension))
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dimension, hidden_dimension),
            nn.ReLU(),
            nn.Linear(hidden_dimension, embedding_dimension)
        )
        self.layer_norm = nn.LayerNorm(embedding_dimension)

    def forward(self, batch_size):
        virtual_embeddings = self.virtual_embeddings.unsqueeze(0).expand(batch_size, -1, -1)
        transformed_embeddings = self.mlp(virtual_embeddings)
        return self.layer_norm(transformed_embeddings)""",
    differences=(),
    before=IMPORTS + "\nOurs = PTuningEmbedding\n",
    after="""
theirs, ours = PTuningEmbedding(20, 768, 512), Ours(20, 768, 512).eval()
values = {name.replace("mlp.2", "mlp.3"): tensor for name, tensor in theirs.state_dict().items()}
ours.load_state_dict(values)  # 3: there is dropout between
torch.testing.assert_close(ours(4), theirs(4))
""",
)

ADALORA = Snippet(
    text="""# Create AdaLoRA layer
adalora_layer = AdaLoRALayer(
    input_dimension=768,
    output_dimension=768,
    rank=8,
    alpha=16.0,
    dropout_probability=0.1,
    bias=False,
    adaptive_rank=True,
    rank_allocation="uniform"
)

# Get effective rank
effective_rank = adalora_layer.get_effective_rank()

# Forward pass with adaptive rank
input_tensor = torch.randn(2, 10, 768)
output = adalora_layer(input_tensor)""",
    differences=(),
    before=IMPORTS,
    after="""
assert output.shape == (2, 10, 768)
assert effective_rank == 0, "no singular value before the first step"
output.sum().backward()
assert adalora_layer.lora_E["default"].grad.any()
""",
)

ADALORA_MECHANISM = Snippet(
    text="""# AdaLoRA adaptive process:
# 1. Learn rank importance scores
# 2. Calculate effective rank based on importance threshold
# 3. Use only top-k ranks for computation
# 4. Dynamically adjust during training

def get_effective_rank(self):
    importance_threshold = 0.1
    effective_rank = (self.rank_importance > importance_threshold).sum().item()
    return max(1, effective_rank)

def forward(self, input_tensor):
    effective_rank = self.get_effective_rank()
    lora_A_effective = self.lora_A[:effective_rank]
    lora_B_effective = self.lora_B[:, :effective_rank]
    # ... rest of forward computation""",
    differences=(),
    before=IMPORTS,
    after="""
# what it is for, done right: importances that are learnt, the least important ranks taken wherever they stand
layer = AdaLoRALayer(8, 8, rank=5)
with torch.no_grad():
    layer.lora_E["default"].copy_(torch.tensor([[0.0], [2.0], [0.0], [1.0], [3.0]]))
assert layer.get_effective_rank() == 3
""",
)

PREFIX = Snippet(
    text="""# Create prefix tuning
prefix_tuning = PrefixTuning(
    num_layers=12,
    num_heads=12,
    head_dimension=64,
    prefix_length=20,
    dropout_probability=0.1
)

# Get prefix states for a specific layer
layer_idx = 0
prefix_key, prefix_value = prefix_tuning.get_prefix_states(layer_idx)
# prefix_key: (prefix_length, num_heads, head_dimension)
# prefix_value: (prefix_length, num_heads, head_dimension)

# Use in attention mechanism
# Concatenate prefix_key with regular keys
# Concatenate prefix_value with regular values""",
    differences=(),
    before=IMPORTS,
    after="""
assert prefix_key.shape == prefix_value.shape == (20, 12, 64)
assert sum(p.numel() for p in prefix_tuning.parameters()) == 368_640
""",
)

PREFIX_ARCHITECTURE = Snippet(
    text="""# Prefix tuning process:
# 1. Learn prefix embeddings for each layer
# 2. Split into key and value prefixes
# 3. Concatenate with regular attention keys/values
# 4. Apply attention mechanism

class PrefixTuning(nn.Module):
    def __init__(self, num_layers, num_heads, head_dimension, prefix_length):
        super().__init__()
        self.prefix_embeddings = nn.ParameterList([
            nn.Parameter(torch.randn(prefix_length, num_heads * head_dimension * 2))
            for _ in range(num_layers)
        ])

    def get_prefix_states(self, layer_idx):
        prefix_embedding = self.prefix_embeddings[layer_idx]
        key_value_dim = self.num_heads * self.head_dimension
        prefix_key = prefix_embedding[:, :key_value_dim]
        prefix_value = prefix_embedding[:, key_value_dim:]
        return prefix_key, prefix_value""",
    differences=(),
    before=IMPORTS + "\nOurs = PrefixTuning\n",
    after="""
theirs, ours = PrefixTuning(2, 4, 6, 3), Ours(2, 4, 6, 3).eval()
theirs.num_heads, theirs.head_dimension = 4, 6  # the document forgets to keep them
ours.load_state_dict(theirs.state_dict())
for layer in range(2):
    for own, other in zip(ours.get_prefix_states(layer), theirs.get_prefix_states(layer), strict=True):
        torch.testing.assert_close(own, other.view(3, 4, 6))
""",
)

MANAGER = Snippet(
    text="""# Create manager
manager = EfficientFineTuningManager(model)

# Apply LoRA
manager.apply_lora(
    target_modules=["self_attn.out_proj", "linear2"],
    rank=8,
    alpha=16.0,
    dropout_probability=0.1,
    bias=False
)

# Apply P-tuning
manager.apply_ptuning(
    num_virtual_tokens=20,
    embedding_dimension=768,
    hidden_dimension=512,
    dropout_probability=0.1
)

# Apply AdaLoRA
manager.apply_adalora(
    target_modules=["self_attn.out_proj", "linear2"],
    rank=8,
    alpha=16.0,
    adaptive_rank=True,
    rank_allocation="uniform"
)

# Apply prefix tuning
manager.apply_prefix_tuning(
    num_layers=12,
    num_heads=12,
    head_dimension=64,
    prefix_length=20
)

# Get trainable parameters
trainable_parameters = manager.get_trainable_parameters()
trainable_count = manager.count_trainable_parameters()""",
    differences=(
        (
            """manager.apply_adalora(
    target_modules=["self_attn.out_proj", "linear2"],""",
            """manager.apply_adalora(
    target_modules=["linear1"],""",
            ONE_ADAPTER,
        ),
    ),
    before=IMPORTS
    + MANAGED
    + """
model = SimpleModel(12)
input_ids = torch.arange(6).view(2, 3)
shape = model(input_ids).shape
""",
    after="""
lora, adalora = 8 * 12 * ((768 + 768) + (64 + 768)), 8 * 12 * (768 + 64 + 1)
assert trainable_count == sum(p.numel() for p in trainable_parameters) == lora + adalora + 804_608 + 368_640
assert len(manager.lora_layers) == 24 and len(manager.adalora_layers) == 12
output = model(input_ids)
assert output.shape == shape
output.square().mean().backward()
at_once = [p for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n and "linear1.lora_B" not in n]
assert all(p.grad is not None and p.grad.any() for p in at_once), "the others are behind a zero for one step"
assert not [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
""",
)

UTILITIES = Snippet(
    text="""# Save and load efficient weights
manager.save_efficient_weights("efficient_weights.pt")
manager.load_efficient_weights("efficient_weights.pt")

# Parameter efficiency analysis
total_parameters = sum(p.numel() for p in model.parameters())
trainable_parameters = manager.count_trainable_parameters()
efficiency = trainable_parameters / total_parameters * 100""",
    differences=(),
    before=IMPORTS
    + MANAGED
    + """
model = SimpleModel(1)
manager = EfficientFineTuningManager(model)
manager.apply_lora(target_modules=["self_attn.out_proj", "linear2"])
""",
    after="""
from safetensors.torch import load_file
assert len(load_file("efficient_weights.pt")) == 4
assert 0 < efficiency < 2
""",
)

SNIPPETS = {
    "lora": LORA,
    "lora_mathematics": LORA_MATHEMATICS,
    "ptuning": PTUNING,
    "ptuning_architecture": PTUNING_ARCHITECTURE,
    "adalora": ADALORA,
    "adalora_mechanism": ADALORA_MECHANISM,
    "prefix": PREFIX,
    "prefix_architecture": PREFIX_ARCHITECTURE,
    "manager": MANAGER,
    "utilities": UTILITIES,
}
