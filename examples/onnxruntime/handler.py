"""Recognises handwritten digits with a network in the ONNX format."""

import os

import numpy as np
import onnxruntime
import pandas as pd


class Handler:
    def __init__(self, config):
        options = onnxruntime.SessionOptions()
        # ONNX Runtime takes every core of the machine unless it is told how many are this worker's: compute.cpu.
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(config["model"], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def handle_batch(self, payload):
        pixels = np.stack(payload["pixels"]).astype("float32")
        labels, probabilities = self.session.run(["label", "probabilities"], {self.input: pixels})
        return pd.DataFrame(
            {"id": payload["id"].to_numpy(), "prediction": labels, "confidence": probabilities.max(axis=1)}
        )
