"""Recognises handwritten digits in images of 8 x 8 pixels."""

import numpy as np
import pandas as pd

from cortex_dask.runtime.handler_process.log import logger


class Handler:
    def __init__(self, config):
        # Called once in each worker. The working directory is the project directory.
        self.threshold = config["threshold"]
        with np.load("model.npz") as model:
            self.weights, self.bias = model["weights"], model["bias"]

    def handle_batch(self, payload, batch_id):
        # Called once for each batch: payload is a DataFrame, and so is what goes to the output.
        pixels = np.stack(payload["pixels"])  # (rows, 64), from 0 (white) to 16 (black)
        logits = pixels @ self.weights + self.bias
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))  # the largest is 1, so none overflows
        probabilities = scores / scores.sum(axis=1, keepdims=True)
        confidence = probabilities.max(axis=1)
        doubtful = int((confidence < self.threshold).sum())
        logger.info("classified a batch", extra={"batch_id": batch_id, "rows": len(payload), "doubtful": doubtful})
        return pd.DataFrame(
            {
                "id": payload["id"].to_numpy(),
                "digit": probabilities.argmax(axis=1),
                "confidence": confidence,
            }
        )
