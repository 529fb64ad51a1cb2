"""``unit-fast data generate``."""

from dataclasses import dataclass

import tyro


@dataclass(kw_only=True)
class Options:
    """Write the generated world: all eight data sets in their real formats."""

    folder: tyro.conf.Positional[str]
    """Where to; a world generated earlier is replaced."""
    seed: int = 0
    """Seed; the same gives the same files."""
    scale: float = 1.0
    """Multiplies the number of samples; 1 has 4000 training scenes."""
    imdb: bool = False
    """Write VQA as MMF's imdb arrays instead of the official files."""


def run(options: Options) -> int:
    from unit_fast.data.generated.world import generate

    made = generate(options.folder, seed=options.seed, scale=options.scale, imdb=options.imdb)
    for task, splits in made["counts"].items():
        print(f"{task:<8} " + ", ".join(f"{split} {count:,}" for split, count in splits.items()))
    print(f"world: {made['folder']}")
    return 0
