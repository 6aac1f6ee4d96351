"""The seed's quick start, word for word."""

import torch
import sire

# 1. Initialize Sire's resource pools
sire.setup_default_pools()

# 2. Create your PyTorch model
class MyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(10, 1)

    def forward(self, x):
        print(f"Executing forward on device: {x.device}")
        return self.linear(x)

model = MyModel()
print(f"Model initial device: {next(model.parameters()).device}")

# 3. Wrap the model to make it Sire-aware
managed_model = sire.manage(model)

# This is only needed for demonstration if you don't have a CUDA device.
# In a real GPU scenario, this would be detected automatically.
if not torch.cuda.is_available():
    print("No CUDA device found, model will stay on CPU.")
else:
    # 4. Use the auto_manage context manager for inference
    print("\nEntering auto_manage context...")
    with sire.auto_manage(managed_model) as am_wrapper:
        # Inside this block, the model is moved to the GPU
        execution_device = am_wrapper.get_execution_device()
        print(f"Model is now on device: {next(model.parameters()).device}")

        # Input tensor must be on the same device
        dummy_input = torch.randn(1, 10).to(execution_device)

        # Run inference
        output = model(dummy_input)

    print("Exited auto_manage context.")
    print(f"Model is now back on device: {next(model.parameters()).device}")
