"""Who trains and who judges, as a manifest that travels with the run.

A manifest is a table with one row a site: `site_id`, `group` (what is kept whole) and `part` ("train" or "test").
Its fingerprint identifies it; two runs are comparable when their fingerprints are the same.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.config import SplitConfig, SplitPolicy
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_parquet, write_parquet
from perturbjax.core.messages import console
from perturbjax.core.options import (
    renamed_from,
    require_fold,
    require_output,
    require_seed,
    require_sound,
)
from perturbjax.data.exclusion import apply_exclusions, read_rules
from perturbjax.dataset import open_dataset

COLUMNS = ("site_id", "group", "part")
TRAIN, TEST = "train", "test"


def make_split(
    index: pd.DataFrame,
    policy: SplitPolicy | str,
    *,
    label: str,
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Deal groups into `folds` parts with similar label shares; part `fold` judges.

    Grouped policies use scikit-learn's `StratifiedGroupKFold(folds, shuffle=True, random_state=seed)` on the rows in
    the order given, `site` its `StratifiedKFold`; so a fold can be named in a paper and found again.

    Args:
        index: one row a site with `site_id`, `Metadata_Plate`, `Metadata_Well` and the column `label`.
        policy: what is kept whole.
        label: column to stratify by.
        folds, fold, seed: number of parts, the judging one, and the shuffle.

    Returns:
        The manifest, in the order of `index`.

    Raises:
        InputError: the split cannot be made, or could not be learned from.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if folds < 2 or not 0 <= fold < folds:
        raise InputError(
            f"--folds {folds} --fold {fold}: needs at least 2 folds and a fold from 0 to folds - 1"
        )
    labels = index[label].to_numpy()
    groups = assign_groups(index, policy)
    if (nameless := pd.Series(groups).astype(str).str.strip() == "").any():
        site = index["site_id"].iloc[int(np.flatnonzero(nameless)[0])]
        raise InputError(
            f"--split {policy}: site {site} has no {policy} to keep whole; fill its column in"
        )
    present = len(np.unique(groups))
    if present < folds:
        raise InputError(
            f"--split {policy} --folds {folds}: there are only {present} groups ({policy}s); use fewer folds"
        )
    counts = pd.Series(labels).value_counts()
    if counts.max() < folds:
        raise InputError(
            f"--split {policy} --folds {folds}: no class of column {label} has more than {counts.max()} sites; "
            "use fewer folds, or choose another --label-column"
        )
    if policy == "site":
        if counts.min() < 2:
            raise InputError(
                f"--split site: label {counts.idxmin()!r} of column {label} has one site and cannot stand on both sides"
                "; leave it out of the CSV or choose another --label-column"
            )
        folder = StratifiedKFold(folds, shuffle=True, random_state=seed)
    else:
        folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer members than folds is usual here; what it means for the score is said by the judge.
        warnings.simplefilter("ignore", UserWarning)
        parts = list(folder.split(np.zeros(len(index)), labels, groups))
    part = np.full(len(index), TRAIN, dtype=object)
    part[parts[fold][1]] = TEST
    manifest = pd.DataFrame({"site_id": index["site_id"].to_numpy(), "group": groups, "part": part})
    manifest.attrs = {"policy": policy, "label": label, "folds": folds, "fold": fold, "seed": seed}
    _require_learnable(manifest, labels, policy, label)
    return manifest


def assign_groups(index: pd.DataFrame, policy: SplitPolicy | str) -> np.ndarray:
    """(n,) text: the group that each site belongs to under a policy."""
    if policy not in SPLIT_POLICIES:
        raise InputError(f"--split {policy}: unknown; choose one of {', '.join(SPLIT_POLICIES)}")
    return SPLIT_POLICIES[policy].groups(index).to_numpy(dtype=object)


def _require_learnable(manifest: pd.DataFrame, labels: np.ndarray, policy: str, label: str) -> None:
    judged = manifest["part"].to_numpy() == TEST
    shared = set(labels[judged]) & set(labels[~judged])
    if len(shared) >= 2:
        return
    both = f"only {shared.pop()!r}" if shared else "no class"
    raise InputError(
        f"--split {policy}: {both} of column {label} stands on both sides, so nothing can be learned; choose another "
        "--label-column, or see `perturbjax audit` for the splits that this data allows"
    )


def fingerprint(manifest: pd.DataFrame) -> str:
    """SHA-256 (hexadecimal) over the sorted (site_id, part) pairs."""
    rows = sorted(
        f"{site}\t{part}" for site, part in zip(manifest["site_id"], manifest["part"], strict=True)
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def write_split(manifest: pd.DataFrame, path: Path) -> None:
    """Write a manifest as parquet, atomically; how it was made travels in its metadata."""
    write_parquet(path, manifest)


def read_split(path: Path, index: pd.DataFrame) -> pd.DataFrame:
    """Read a manifest and put it in the order of `index`.

    Sites the manifest leaves out are neither trained on nor judged.

    Raises:
        InputError: unreadable, a column is missing, a part is unknown, a site is unknown or twice there, a group
            stands on both sides, or a side is empty.
    """
    manifest = read_parquet(path, "make it again with `perturbjax split`")
    if missing := [column for column in COLUMNS if column not in manifest.columns]:
        raise InputError(f"{path}: no column {missing[0]!r}; a manifest has {', '.join(COLUMNS)}")
    if unknown := set(manifest["part"]) - {TRAIN, TEST}:
        raise InputError(
            f"{path}: unknown part {sorted(map(str, unknown))[0]!r}; parts are {TRAIN} and {TEST}"
        )
    if manifest["site_id"].duplicated().any():
        raise InputError(
            f"{path}: site {manifest.loc[manifest['site_id'].duplicated(), 'site_id'].iloc[0]!r} is twice there"
        )
    if strangers := set(manifest["site_id"]) - set(index["site_id"]):
        raise InputError(
            f"{path}: site {sorted(strangers)[0]!r} is not in the dataset; make the manifest from this dataset"
        )
    group = manifest["group"]
    if (empty := group.isna() | (group.astype(str).str.strip() == "")).any():
        raise InputError(
            f"{path}: site {manifest.loc[empty, 'site_id'].iloc[0]!r} has no group, so nothing says what it must not "
            "be parted from; name it"
        )
    require_no_overlap(manifest, path)
    order = pd.Index(index["site_id"])
    kept = manifest.set_index("site_id").loc[order[order.isin(manifest["site_id"])]].reset_index()
    kept.attrs = manifest.attrs
    return kept


def require_no_overlap(manifest: pd.DataFrame, path: Path | str = "split") -> None:
    """Refuse a manifest in which a group stands on both sides, or a side is empty.

    Raises:
        InputError: it does; the message names a group.
    """
    sides = manifest.groupby("group")["part"].nunique()
    if (sides > 1).any():
        raise InputError(
            f"{path}: group {sides.index[sides > 1][0]!r} stands in both train and test; deal it to one side"
        )
    for part in (TRAIN, TEST):
        if not (manifest["part"] == part).any():
            raise InputError(f"{path}: no site is in {part}; give both sides some")


def create_manifest(
    index: pd.DataFrame, config: SplitConfig, *, label: str, seed: int
) -> pd.DataFrame:
    """The manifest that a configuration asks for, read or made, of the sites that it does not exclude.

    What was excluded is said in `attrs["excluded"]`, a sentence a rule.
    """
    kept, said = apply_exclusions(index, read_rules(config.exclude), label)
    if config.split_file:
        manifest = without(read_split(Path(config.split_file), index), index["site_id"][~kept])
    else:
        index = index[kept]
        manifest = make_split(
            index, config.split, label=label, folds=config.folds, fold=config.fold, seed=seed
        )
    manifest.attrs["excluded"] = said
    return manifest


def without(manifest: pd.DataFrame, site_ids: pd.Series) -> pd.DataFrame:
    """A manifest less some sites.

    Raises:
        InputError: that leaves a side empty.
    """
    left = manifest[~manifest["site_id"].isin(site_ids)].reset_index(drop=True)
    require_no_overlap(left, "--exclude")
    return left


@dataclass(frozen=True)
class ManifestConfig:
    """Split a dataset into training and test sites."""

    data: tuple[Path, ...]
    """Dataset directories with the same channels."""
    out: Path
    """Split to write (.parquet), for `perturbjax train --split-file`."""
    split: SplitPolicy = renamed_from("well", "policy")
    """Sites that stay together: of one site, well, plate, plate layout or compound."""
    label_column: str = ""
    """Index column for stratification; by default the label column of the dataset."""
    folds: int = 5
    """Number of folds; one of them is the test set."""
    fold: int = 0
    """Fold of the test set, from 0."""
    seed: int = 0
    """Random seed."""
    exclude: tuple[str, ...] = ()
    """Sites to leave out: rules such as focus_DNA<-6 or Metadata_Well==A01, or files of rules."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".parquet")
        require_fold(self.fold, self.folds)
        require_seed(self.seed)


def split_dataset(options: ManifestConfig) -> Path:
    """Deal a dataset's sites to training and judging, and write the manifest.

    Raises:
        InputError: the dataset cannot be opened, has no such column, or cannot be dealt so.
    """
    dataset = open_dataset(options.data)
    label = dataset.column(options.label_column or dataset.label_column).name
    config = SplitConfig(
        split=options.split, folds=options.folds, fold=options.fold, exclude=options.exclude
    )
    manifest = create_manifest(dataset.index, config, label=label, seed=options.seed)
    for sentence in manifest.attrs["excluded"]:
        console.print(sentence)
    write_split(manifest, options.out)
    judged = (manifest["part"] == TEST).sum()
    console.print(f"{options.split}: {SPLIT_POLICIES[options.split].meaning}")
    console.print(
        f"{len(manifest) - judged} sites train, {judged} judge; fingerprint {fingerprint(manifest)}"
    )
    return options.out
