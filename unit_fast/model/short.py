"""A module that prints as one line."""


class Short:
    """Prints a module's name, parts and parameters; ``print(list(model.named_modules()))`` has the tree."""

    def __repr__(self) -> str:
        parts = [name for name, _ in self.named_children()]
        return f"{type(self).__name__}({sum(p.numel() for p in self.parameters()):,} parameters: {', '.join(parts)})"
