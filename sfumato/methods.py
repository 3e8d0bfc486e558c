"""The tasks as methods of a model: `model.edit(source, label="7")` is `sfumato.edit(model, source, label="7")`."""

from typing import Any


class Methods:
    """What can be done with a model; what each takes and returns stands with the function of the same name."""

    def generate(self, n: int = 64, **settings: Any) -> Any:
        """New items: see `sfumato.generate`."""
        return self._task("generate", n=n, **settings)

    def interpolate(self, a: Any, b: Any, **settings: Any) -> Any:
        """From one item to another: see `sfumato.interpolate`."""
        return self._task("interpolate", a, b, **settings)

    def reconstruct(self, source: Any, **settings: Any) -> Any:
        """Items through the codec and back: see `sfumato.reconstruct`."""
        return self._task("reconstruct", source, **settings)

    def edit(self, source: Any, **settings: Any) -> Any:
        """Items under another label: see `sfumato.edit`."""
        return self._task("edit", source, **settings)

    def inpaint(self, source: Any, **settings: Any) -> Any:
        """A part of items made anew: see `sfumato.inpaint`."""
        return self._task("inpaint", source, **settings)

    def outpaint(self, source: Any, **settings: Any) -> Any:
        """Images continued beyond their borders: see `sfumato.outpaint`."""
        return self._task("outpaint", source, **settings)

    def transfer(self, source: Any, label: str, **settings: Any) -> Any:
        """Items carried over into another class: see `sfumato.transfer`."""
        return self._task("transfer", source, label=label, **settings)

    def augment(self, source: Any, **settings: Any) -> Any:
        """A labelled set made larger and balanced: see `sfumato.augment`."""
        return self._task("augment", source, **settings)

    def evaluate(self, source: Any, **settings: Any) -> Any:
        """How good the model is: see `sfumato.evaluate`."""
        return self._task("evaluate", source, **settings)

    def _task(self, name: str, *given: Any, **settings: Any) -> Any:
        import sfumato

        return getattr(sfumato, name)(self, *given, **settings)
