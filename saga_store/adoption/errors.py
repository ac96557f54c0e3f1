"""Why tables can't be adopted."""

from saga_store.schema.settings import MigrationError


class AdoptionError(MigrationError):
    """The tables aren't as they would have to be; nothing was done.

    Attributes:
        differences: What differs, a line for each.
    """

    def __init__(self, message: str, differences: tuple[str, ...]) -> None:
        super().__init__("\n".join([message, *(f"  {difference}" for difference in differences)]))
        self.differences = differences

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self).partition("\n")[0], self.differences)
