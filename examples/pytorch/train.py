"""Makes noisy waveforms, trains on some, and leaves others for the job."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from network import CLASSES, make_network
from torch import nn

LENGTH = 64


def make_waveforms(count, seed):
    random = np.random.default_rng(seed)
    kind = random.integers(len(CLASSES), size=count)
    turns = random.uniform(2, 5, size=(count, 1)) * np.linspace(0, 1, LENGTH) + random.uniform(size=(count, 1))
    waves = np.stack([np.sin(2 * np.pi * turns), np.sign(np.sin(2 * np.pi * turns)), 2 * (turns % 1) - 1])
    samples = waves[kind, np.arange(count)] + random.normal(scale=0.3, size=(count, LENGTH))
    return samples.astype("float32"), kind


torch.manual_seed(0)
torch.set_num_threads(1)  # the network is so small that more would only wait for each other
samples, kind = (torch.from_numpy(array) for array in make_waveforms(6_000, seed=1))
network = make_network()
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(6):
    for rows in torch.randperm(len(samples)).split(128):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(samples[rows].unsqueeze(1)), kind[rows])
        loss.backward()
        optimizer.step()
torch.save(network.state_dict(), "model.pt")

samples, kind = make_waveforms(20_000, seed=2)
table = pa.table(
    {
        "id": np.arange(len(samples)),
        "samples": pa.FixedSizeListArray.from_arrays(samples.ravel(), LENGTH),
        "target": [CLASSES[item] for item in kind],
    }
)
Path("data").mkdir(exist_ok=True)
for number in range(8):
    pq.write_table(table.slice(number * 2_500, 2_500), f"data/{number}.parquet")
