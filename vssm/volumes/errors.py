"""The one error that reading, predicting and writing volumes raise for the caller."""


class VolumeError(ValueError):
    """A volume, bundle or result file cannot be used; the message is one sentence: what, why and what to do."""

    def __init__(self, message: str):
        # causes quoted from other libraries may come in several lines
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
