"""A store of checkpoints for tests."""


class Kept(dict[str, bytes]):
    """In memory."""

    def save(self, name: str, payload: bytes) -> None:
        self[name] = payload

    def load(self, name: str) -> bytes | None:
        return self.get(name)
