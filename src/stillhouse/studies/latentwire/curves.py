"""What a channel's training leaves behind for figures beside its metrics: `diagnostics.jsonl`; no torch here."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from stillhouse.config.base import StrictModel
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text

DIAGNOSTICS_FILE = "diagnostics.jsonl"


class ReaderDiagnostics(StrictModel):
    """How one reader's prefixes look beside the embeddings of the same texts' tokens.

    prefix_rms, embedding_rms: root mean square over all components. first_token_share: share of the most frequent
    greedy first token. between_share: share of the prefixes' variance that lies between texts, not between positions.
    *_explained: cumulative share of variance by number of principal components. inside_share: share of the
    prefixes' variance inside the space of the embeddings' leading components.
    """

    prefix_rms: float
    embedding_rms: float
    first_token_share: float
    distinct_first_tokens: int
    between_share: float
    prefix_explained: tuple[float, ...]
    embedding_explained: tuple[float, ...]
    inside_share: float


class DiagnosticsRow(StrictModel):
    """One look at a channel during its training, over the same texts each time."""

    step: int
    texts: int
    latent_mean: float
    latent_std: float
    latent_rms: float
    latent_abs_max: float
    latent_between_share: float
    latent_explained: tuple[float, ...]
    readers: dict[str, ReaderDiagnostics]


def read_diagnostics(path: Path) -> list[DiagnosticsRow]:
    """The rows of a file by step; a missing or damaged file is a `UserError` that names it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [DiagnosticsRow.model_validate_json(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}): train again") from None


def append_diagnostics(path: Path, row: DiagnosticsRow) -> None:
    """Add a row; rows of the same step or later ones, which a killed run left behind, give way to it."""
    earlier = [one for one in read_diagnostics(path) if one.step < row.step] if path.is_file() else []
    atomic_write_text(path, "".join(one.model_dump_json() + "\n" for one in [*earlier, row]))
