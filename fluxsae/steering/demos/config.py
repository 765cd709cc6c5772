"""What the searches for demos and swaps try: options that load nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the search tries for each feature."""

    n_candidates: int = 4
    """Images tried for each feature: from the one where it fires most down to one where it fires a little."""
    suppress: tuple[float, ...] = (0.0, -1.0)
    """Strengths of mode scale: what is left of the feature; below 0 more is taken away than is there."""
    amplify: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Strengths of mode add: multiples of the feature's reference activation."""
    steps: tuple[int, int] | None = None
    """Window of the edits, [start, stop); left out, the noise levels the SAE was trained on."""
    n_limit_images: int = 16
    """Unsteered images from which the limits of clean tokens are measured, once a hook point."""
    n_natural_images: int = 80
    """Prompts from whose unedited images it is found what looks natural, once a hook point; two images each."""
    picture_side: int = 256
    """Longest side of a picture in the demo's strip, pixels."""
    least_score: float = 0.005
    """A demo with less shows nothing to the eye and is not kept."""


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """What is tried to swap one name for another."""

    suppress: tuple[float, ...] = (0.0, -1.0)
    """Strengths of mode scale for the feature that is taken away."""
    amplify: tuple[tuple[int, float], ...] = ((1, 0.3), (1, 0.6), (2, 0.3), (3, 0.2))
    """How many features of the new name are added, best ranked first, and the strength of mode add of each."""
    n_images: int = 3
    """Images tried for each feature beside its demo's: from one where it fires most down to one where it fires less."""
    n_names: int = 5
    """New names tried on each image: those most alike in use (see `alike`)."""
    alike: float = 0.7
    """Names are of one kind where the words they stand between in the run's prompts have at least this cosine: prompts
    of one grammar, like the miniature's, tell kinds; in FLUX.1-dev's freer ones few names or wrong ones are alike."""
    n_rivals: int = 16
    """Other names of the kind that a picture may be read as, the most alike."""
    steps: tuple[int, int] | None = None
    """Window of the edits, [start, stop); left out, the noise levels the SAE was trained on."""
    heat: float = 0.25
    """The region: patches where the old feature fires at least at this share of its strongest patch."""
    picture_side: int = 256
    """Longest side of a picture in the swap's strip, pixels."""
