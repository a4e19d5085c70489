"""Tells noisy waveforms apart with a convolutional network."""

import numpy as np
import pandas as pd
import torch
from network import CLASSES, make_network


class Handler:
    def __init__(self, config):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = make_network().to(self.device).eval()
        self.network.load_state_dict(torch.load(config["model"], map_location=self.device, weights_only=True))

    def handle_batch(self, payload):
        samples = torch.from_numpy(np.stack(payload["samples"])).to(self.device)
        with torch.inference_mode():
            scores = self.network(samples.unsqueeze(1)).softmax(dim=1)
        confidence, index = (tensor.cpu().numpy() for tensor in scores.max(dim=1))
        return pd.DataFrame(
            {
                "id": payload["id"].to_numpy(),
                "prediction": [CLASSES[item] for item in index],
                "confidence": confidence,
            }
        )
