"""The smallest complete example: `snapshotd run -- python examples/minimal.py`.

Interrupt it as you like and start it again with the same command: it goes on where it was.
"""

import torch

import snapshotd_client  # 1

torch.set_num_threads(1)  # a model as small as this one gains nothing from more
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2000)

guard = snapshotd_client.protect(model, optimizer, job="minimal", extra={"scheduler": scheduler})  # 2

for step in range(guard.restore(), 2000):  # 3: 0 where there is nothing to restore
    inputs = torch.randn(512, 64)
    loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    guard.step()  # 4: what the snapshot holds is the state here
    if step % 100 == 0:
        print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)

guard.close()  # the run is over: its snapshots may be freed
