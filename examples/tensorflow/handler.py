"""Tells to which arm of a spiral a point belongs."""

import pandas as pd


class Handler:
    def __init__(self, config, tensorflow_client):
        self.client = tensorflow_client
        self.labels = config["labels"]

    def handle_batch(self, payload):
        scores = self.client.predict({"point": payload[["x", "y"]]})["output_0"]
        return pd.DataFrame(
            {
                "id": payload["id"].to_numpy(),
                "prediction": [self.labels[index] for index in scores.argmax(axis=1)],
                "confidence": scores.max(axis=1),
            }
        )
