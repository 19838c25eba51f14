"""The snippets of the efficient fine-tuning document with whole examples and training workflows."""

from __future__ import annotations

from documents import Snippet

PACKAGE = "the document's module is part of one package here; every public name imports from it"
BATCH_FIRST = "without it the encoder reads (seq, batch): its attention would mix the rows of a batch, and a warning says so"
IMPORTS = """
import copy
import torch
import torch.nn as nn
import torch.nn.functional as F
import peftlab
from peftlab import LoRALayer, apply_lora_to_model, apply_ptuning_to_model, recommend
torch.manual_seed(0)
"""
TRAINING = """
num_epochs = 2
def criterion(outputs, labels):
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())
dataloader = [
    {"input_ids": torch.arange(i, i + 10).view(2, 5), "labels": torch.arange(10).view(2, 5) % 7} for i in range(3)
]
"""
SMALL_MODEL = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(40, 16), nn.Linear(16, 7)
        self.attention, self.mlp = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids):
        return self.output(F.relu(self.mlp(F.relu(self.attention(self.embedding(input_ids))))))

model = Model()
before = copy.deepcopy(model.state_dict())
"""
TRAINED = """
for name, tensor in before.items():
    part, _, kind = name.rpartition(".")
    path = name if name in model.state_dict() else f"{part}.base_layer.{kind}"
    assert torch.equal(model.state_dict()[path], tensor), "the base does not move"
assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters)
assert len(trainable_parameters) == len({id(p) for p in trainable_parameters})
"""

LORA_EXAMPLE = Snippet(
    text="""from .efficient_finetuning import apply_lora_to_model

# Create model
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(768, 768)
        self.linear2 = nn.Linear(768, 768)
        self.output = nn.Linear(768, 1000)

    def forward(self, x):
        x = F.relu(self.linear1(x))
        x = F.relu(self.linear2(x))
        return self.output(x)

model = SimpleModel()

# Apply LoRA
manager = apply_lora_to_model(
    model=model,
    target_modules=["linear1", "linear2"],
    rank=8,
    alpha=16.0,
    dropout_probability=0.1,
    bias=False
)

# Training
trainable_parameters = manager.get_trainable_parameters()
optimizer = torch.optim.AdamW(trainable_parameters, lr=1e-4)

# Forward pass
input_tensor = torch.randn(2, 10, 768)
output = model(input_tensor)""",
    differences=(
        (
            "from .efficient_finetuning import apply_lora_to_model",
            "from peftlab import apply_lora_to_model",
            PACKAGE,
        ),
    ),
    before=IMPORTS,
    after="""
assert output.shape == (2, 10, 1000)
assert manager.count_trainable_parameters() == 2 * 8 * (768 + 768)
output.square().mean().backward()
optimizer.step()
assert all(layer.lora_B["default"].weight.any() for layer in manager.lora_layers.values())
""",
)

PTUNING_EXAMPLE = Snippet(
    text="""from .efficient_finetuning import apply_ptuning_to_model

# Create model
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 768)
        self.transformer = nn.TransformerEncoderLayer(
            d_model=768,
            nhead=12,
            dim_feedforward=3072,
            dropout=0.1
        )
        self.output = nn.Linear(768, 1000)

    def forward(self, input_ids):
        embeddings = self.embedding(input_ids)
        # Concatenate P-tuning embeddings here
        output = self.transformer(embeddings)
        return self.output(output)

model = SimpleModel()

# Apply P-tuning
manager = apply_ptuning_to_model(
    model=model,
    num_virtual_tokens=20,
    embedding_dimension=768,
    hidden_dimension=512,
    dropout_probability=0.1
)

# Get virtual tokens
batch_size = 4
virtual_tokens = manager.ptuning_embeddings(batch_size)""",
    differences=(
        (
            "from .efficient_finetuning import apply_ptuning_to_model",
            "from peftlab import apply_ptuning_to_model",
            PACKAGE,
        ),
        (
            "            dropout=0.1\n",
            "            dropout=0.1,\n            batch_first=True,\n",
            BATCH_FIRST,
        ),
    ),
    before=IMPORTS,
    after="""
assert virtual_tokens.shape == (batch_size, 20, 768)
output = model(torch.arange(20).view(4, 5))
assert output.shape == (4, 5, 1000), "the virtual tokens are in every call, their positions not in its output"
output.square().mean().backward()
assert all(p.grad.any() for p in manager.get_trainable_parameters())
""",
)

ADALORA_EXAMPLE = Snippet(
    text="""from .efficient_finetuning import apply_adalora_to_model

# Create model
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(768, 768)
        self.linear2 = nn.Linear(768, 768)
        self.output = nn.Linear(768, 1000)

    def forward(self, x):
        x = F.relu(self.linear1(x))
        x = F.relu(self.linear2(x))
        return self.output(x)

model = SimpleModel()

# Apply AdaLoRA
manager = apply_adalora_to_model(
    model=model,
    target_modules=["linear1", "linear2"],
    rank=8,
    alpha=16.0,
    dropout_probability=0.1,
    bias=False,
    adaptive_rank=True,
    rank_allocation="uniform"
)

# Get effective rank
for name, adalora_layer in manager.adalora_layers.items():
    effective_rank = adalora_layer.get_effective_rank()
    print(f"{name}: effective rank = {effective_rank}")""",
    differences=(
        (
            "from .efficient_finetuning import apply_adalora_to_model",
            "from peftlab import apply_adalora_to_model",
            PACKAGE,
        ),
    ),
    before=IMPORTS,
    after="""
optimizer = torch.optim.AdamW(manager.get_trainable_parameters(), lr=1e-3)
manager.begin(total_steps=20, target_rank=4)
for step in range(1, 21):
    optimizer.zero_grad()
    loss = model(torch.randn(2, 10, 768)).square().mean() + manager.orthogonality_loss()
    loss.backward()
    optimizer.step()
    manager.update_and_allocate(step)
assert [layer.get_effective_rank() for layer in manager.adalora_layers.values()] == [4, 4], "ranks really change"
""",
)

PREFIX_EXAMPLE = Snippet(
    text="""from .efficient_finetuning import apply_prefix_tuning_to_model

# Create model
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 768)
        self.transformer = nn.TransformerEncoderLayer(
            d_model=768,
            nhead=12,
            dim_feedforward=3072,
            dropout=0.1
        )
        self.output = nn.Linear(768, 1000)

    def forward(self, input_ids):
        embeddings = self.embedding(input_ids)
        # Use prefix tuning here
        output = self.transformer(embeddings)
        return self.output(output)

model = SimpleModel()

# Apply prefix tuning
manager = apply_prefix_tuning_to_model(
    model=model,
    num_layers=1,
    num_heads=12,
    head_dimension=64,
    prefix_length=20,
    dropout_probability=0.1
)

# Get prefix states
layer_idx = 0
prefix_key, prefix_value = manager.prefix_tuning.get_prefix_states(layer_idx)""",
    differences=(
        (
            "from .efficient_finetuning import apply_prefix_tuning_to_model",
            "from peftlab import apply_prefix_tuning_to_model",
            PACKAGE,
        ),
    ),
    before=IMPORTS,
    after="""
assert prefix_key.shape == prefix_value.shape == (20, 12, 64)
output = model(torch.arange(20).view(4, 5))
assert output.shape == (4, 5, 1000)
output.square().mean().backward()
assert manager.prefix_tuning.prefix_embeddings[0].grad.any(), "attention reads it"
manager.remove()
assert not torch.allclose(model(torch.arange(20).view(4, 5)), output)
""",
)

LORA_WORKFLOW = Snippet(
    text="""# 1. Apply LoRA to model
manager = apply_lora_to_model(model, target_modules=["attention", "mlp"])

# 2. Get trainable parameters
trainable_parameters = manager.get_trainable_parameters()

# 3. Create optimizer (only for trainable parameters)
optimizer = torch.optim.AdamW(trainable_parameters, lr=1e-4)

# 4. Training loop
model.train()
for epoch in range(num_epochs):
    for batch in dataloader:
        # Forward pass
        outputs = model(batch['input_ids'])
        loss = criterion(outputs, batch['labels'])

        # Backward pass
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# 5. Save efficient weights
manager.save_efficient_weights("lora_weights.pt")""",
    differences=(),
    before=IMPORTS + TRAINING + SMALL_MODEL,
    after="""
"""
    + TRAINED
    + """
fresh = Model()
fresh.load_state_dict(before)
loaded = apply_lora_to_model(fresh, target_modules=["attention", "mlp"])
loaded.load_efficient_weights("lora_weights.pt")
assert torch.equal(fresh.eval()(dataloader[0]["input_ids"]), model.eval()(dataloader[0]["input_ids"]))
""",
)

PTUNING_WORKFLOW = Snippet(
    text="""# 1. Apply P-tuning to model
manager = apply_ptuning_to_model(model, num_virtual_tokens=20)

# 2. Get trainable parameters
trainable_parameters = manager.get_trainable_parameters()

# 3. Create optimizer
optimizer = torch.optim.AdamW(trainable_parameters, lr=1e-4)

# 4. Training loop
model.train()
for epoch in range(num_epochs):
    for batch in dataloader:
        # Get virtual tokens
        virtual_tokens = manager.ptuning_embeddings(batch['input_ids'].size(0))

        # Concatenate with input embeddings
        input_embeddings = model.embedding(batch['input_ids'])
        combined_embeddings = torch.cat([virtual_tokens, input_embeddings], dim=1)

        # Forward pass
        outputs = model.transformer(combined_embeddings)
        outputs = model.output(outputs)
        loss = criterion(outputs, batch['labels'])

        # Backward pass
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# 5. Save efficient weights
manager.save_efficient_weights("ptuning_weights.pt")""",
    differences=(
        (
            "outputs = model.output(outputs)",
            "outputs = model.output(outputs)[:, virtual_tokens.size(1):]",
            "the virtual positions have no labels: 25 positions do not fit 5",
        ),
    ),
    before=IMPORTS
    + TRAINING
    + SMALL_MODEL
    + """
model.transformer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
Model.forward = lambda self, ids: self.output(self.transformer(self.embedding(ids)))
before = copy.deepcopy(model.state_dict())
""",
    after="""
"""
    + TRAINED
    + """
model.eval()
ids = dataloader[0]["input_ids"]
tokens = torch.cat([manager.ptuning_embeddings(2), model.embedding(ids)], dim=1)
torch.testing.assert_close(model(ids), model.output(model.transformer(tokens))[:, 20:]), "as in a call of the whole"
""",
)

SNIPPETS = {
    "lora_example": LORA_EXAMPLE,
    "ptuning_example": PTUNING_EXAMPLE,
    "adalora_example": ADALORA_EXAMPLE,
    "prefix_example": PREFIX_EXAMPLE,
    "lora_workflow": LORA_WORKFLOW,
    "ptuning_workflow": PTUNING_WORKFLOW,
}
