"""Train/test splits: assign groups of sites to train or test, and store the assignment as a
manifest.

A manifest is a table with one row for each site: `site_id`, `group` (never divided between train
and test) and `part` ("train" or "test"). Files are parquet or CSV. A file without `group` gets the
wells as groups, or the sites if it divides wells. Its fingerprint identifies it: runs with the same
fingerprint can be compared. The split policies are the records of
`perturbjax.core.choices.SPLIT_POLICIES`.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.config import AUTO, SPLIT_CHOICES, AnySplit, SplitConfig
from perturbjax.core.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_parquet, write_csv, write_parquet
from perturbjax.core.messages import console, csv_value
from perturbjax.core.options import (
    chosen_from,
    require_fold,
    require_output,
    require_seed,
    require_sound,
)
from perturbjax.data.exclusion import apply_exclusions, read_rules
from perturbjax.data.split_choice import assign_groups, choose_split
from perturbjax.dataset import open_dataset

COLUMNS = ("site_id", "part")
TRAIN, TEST = "train", "test"
#: Split policy -> weaker policy that a single group allows.
_WEAKER = {"compound": "well", "layout": "well", "plate": "well"}
#: Training groups that are held out to choose the best checkpoint; not part of the test set.
VALIDATION = "validation"


def make_split(
    index: pd.DataFrame,
    policy: str,
    *,
    label: str,
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Divide groups into `folds` parts with similar class proportions; part `fold` is the test set.

    Args:
        index: one row for each site with `site_id`, `Metadata_Plate`, `Metadata_Well` and the
            column `label`.
        policy: a name in `SPLIT_POLICIES`.
        label: column to stratify by.
        folds: number of parts, at least 2.
        fold: part that is the test set, from 0.
        seed: seed of the shuffle.

    Returns:
        The manifest, in the order of `index`.

    Raises:
        InputError: the data does not allow this split, or fewer than two classes occur in both
            train and test.

    Source:
        scikit-learn: `StratifiedKFold` for policy "site", else `StratifiedGroupKFold`, with
        `shuffle=True, random_state=seed`, on the rows of `index`. Policy, folds, fold and seed
        therefore identify a test set.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels, groups = index[label].to_numpy(), assign_groups(index, policy)
    _require_possible(index, policy, label, groups, folds, fold)
    # Each group is one site under the policy "site", so no grouping is required.
    kind = StratifiedKFold if policy == "site" else StratifiedGroupKFold
    with warnings.catch_warnings():
        # Classes with fewer members than folds are common here; evaluation reports the classes it
        # leaves out.
        warnings.simplefilter("ignore", UserWarning)
        splitter = kind(folds, shuffle=True, random_state=seed)
        parts = list(splitter.split(np.zeros(len(index)), labels, groups))
    part = np.full(len(index), TRAIN, dtype=object)
    # A split of scikit-learn is (train rows, test rows).
    part[parts[fold][1]] = TEST
    manifest = pd.DataFrame({"site_id": index["site_id"].to_numpy(), "group": groups, "part": part})
    manifest.attrs = {"policy": policy, "label": label, "folds": folds, "fold": fold, "seed": seed}
    _require_learnable(manifest, labels, policy, label)
    return manifest


def _require_possible(
    index: pd.DataFrame, policy: str, label: str, groups: np.ndarray, folds: int, fold: int
) -> None:
    flags = f"--split {policy} --folds {folds}"
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(
            f"--folds {folds} --fold {fold}: pass at least 2 folds, and a fold from 0 to folds - 1."
        )
    if (empty := pd.Series(groups).astype(str).str.strip() == "").any():
        site = index["site_id"].iloc[int(np.flatnonzero(empty)[0])]
        raise InputError(
            f"--split {policy}: site {site} has no {policy} name. Fill in its column in the CSV "
            "file and rebuild."
        )
    present = len(np.unique(groups))
    if present < 2:
        raise InputError(
            f"--split {policy}: the dataset has only one {policy}, so no number of folds can "
            "divide "
            f"it into train and test. Use --split {_WEAKER.get(policy, 'site')}."
        )
    if present < folds:
        raise InputError(
            f"{flags}: there are only {present} groups ({policy}s), fewer than folds. Use --folds "
            f"{present}, or add {policy}s."
        )
    counts = pd.Series(index[label].to_numpy()).value_counts()
    if counts.max() < folds:
        raise InputError(
            f"{flags}: no class of column {label} has more than {counts.max()} sites. Use fewer "
            "folds, or pass "
            "another --label-column."
        )
    if policy == "site" and counts.min() < 2:
        raise InputError(
            f"--split site: class {counts.idxmin()!r} of column {label} has only one site, which "
            "cannot be in both "
            "train and test. Remove it from the CSV file, or pass another --label-column."
        )


def _require_learnable(manifest: pd.DataFrame, labels: np.ndarray, policy: str, label: str) -> None:
    is_test = manifest["part"].to_numpy() == TEST
    # Only classes with sites in both sets can be trained and evaluated.
    shared = set(labels[is_test]) & set(labels[~is_test])
    if len(shared) >= 2:
        return
    classes = f"only class {shared.pop()!r}" if shared else "no class"
    raise InputError(
        f"--split {policy}: {classes} of column {label} occurs in both train and test, so nothing "
        "can be learned. "
        "Pass another --label-column, or run `perturbjax audit` to list the splits that this data "
        "allows."
    )


def fingerprint(manifest: pd.DataFrame) -> str:
    """Return the SHA-256 (hexadecimal) of the sorted (site_id, part) pairs."""
    # Sorted, so that the order of rows has no effect.
    rows = sorted(
        f"{site}\t{part}" for site, part in zip(manifest["site_id"], manifest["part"], strict=True)
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def write_split(manifest: pd.DataFrame, path: Path) -> None:
    """Write a manifest atomically, as CSV if the name ends in .csv, otherwise as parquet.

    Parquet has the parameters of the split in its metadata.
    """
    (write_csv if path.suffix == ".csv" else write_parquet)(path, manifest)


def read_split(path: Path, index: pd.DataFrame) -> pd.DataFrame:
    """Read a manifest, in the order of `index`. Sites absent from it are neither in train nor in
    test.

    Raises:
        InputError: the file is damaged, a column is missing, a part is not train, validation or
            test, a site is absent from the dataset or duplicated, a group is in both train and
            test, or one of these is empty.
    """
    if path.suffix == ".parquet":
        manifest = read_parquet(path, "create it again with `perturbjax split`")
    else:
        manifest = read_table(path).map(csv_value)
    if missing := [column for column in COLUMNS if column not in manifest.columns]:
        raise InputError(
            f"{path}: no column {missing[0]!r}. A manifest has the columns {', '.join(COLUMNS)}, "
            "and group if sites stay together."
        )
    if unknown := set(manifest["part"]) - {TRAIN, VALIDATION, TEST}:
        raise InputError(
            f"{path}: unknown part {min(map(str, unknown))!r}. Use {TRAIN}, {VALIDATION} and "
            f"{TEST}."
        )
    sites = manifest["site_id"]
    if (duplicate := sites.duplicated()).any():
        raise InputError(
            f"{path}: site {sites[duplicate].iloc[0]!r} occurs twice. Remove one of its rows."
        )
    if absent := set(sites) - set(index["site_id"]):
        raise InputError(
            f"{path}: site {min(absent)!r} is not in the dataset. Create the manifest from this "
            "dataset."
        )
    if "group" not in manifest.columns:
        manifest = _add_groups(manifest, index)
    group = manifest["group"]
    if (empty := group.isna() | (group.astype(str).str.strip() == "")).any():
        raise InputError(
            f"{path}: site {sites[empty].iloc[0]!r} has no group. Fill in the column 'group'."
        )
    require_no_overlap(manifest, path)
    order = pd.Index(index["site_id"])
    # The rows of the manifest in the order of the dataset.
    ordered = manifest.set_index("site_id").loc[order[order.isin(sites)]].reset_index()
    ordered.attrs = manifest.attrs
    return ordered


def _add_groups(manifest: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Add the wells as groups, or the sites if the manifest divides wells."""
    wells = pd.Series(assign_groups(index, "well"), index=index["site_id"])
    groups = manifest["site_id"].map(wells)
    is_divided = (manifest["part"].groupby(groups.to_numpy()).nunique() > 1).any()
    result = manifest.assign(group=manifest["site_id"] if is_divided else groups)
    result.attrs = manifest.attrs
    return result[["site_id", "group", "part"]]


def require_no_overlap(manifest: pd.DataFrame, path: Path | str = "split") -> None:
    """Check that no group is in both train and test, and that both have sites.

    Raises:
        InputError: names the group or the empty part.
    """
    # Validation counts as a part, too: its groups must not be in train or test.
    parts = manifest.groupby("group")["part"].nunique()
    if (parts > 1).any():
        raise InputError(
            f"{path}: group {parts.index[parts > 1][0]!r} is in both train and test. Assign it to "
            "one of them."
        )
    for part in (TRAIN, TEST):
        if not (manifest["part"] == part).any():
            raise InputError(f"{path}: no site is in {part}. Assign sites to both train and test.")


def create_manifest(
    index: pd.DataFrame, config: SplitConfig, *, label: str, seed: int
) -> pd.DataFrame:
    """Read or make the split of a configuration, without the sites that it excludes.

    Returns:
        The manifest. `attrs["notes"]` has one sentence for each exclusion rule, and the reason of
        an automatic choice; `attrs["policy"]` is the policy.
    """
    included, sentences = apply_exclusions(index, read_rules(config.exclude), label)
    if config.split_file:
        manifest = remove_sites(
            read_split(Path(config.split_file), index), index["site_id"][~included]
        )
    else:
        policy = config.split
        if policy == AUTO:
            policy, reason = choose_split(index[included], label, config.folds)
            sentences.append(reason)
        manifest = make_split(
            index[included],
            policy,
            label=label,
            folds=config.folds,
            fold=config.fold,
            seed=seed,
        )
    if config.validation_fraction and not (manifest["part"] == VALIDATION).any():
        labels = index.set_index("site_id")[label].astype(str)
        manifest = hold_out_validation(manifest, labels, config.validation_fraction, seed)
    manifest.attrs["notes"] = sentences
    return manifest


def split_name(config: SplitConfig, manifest: pd.DataFrame) -> str:
    """Return the policy of a split, or the name of its file."""
    policy = manifest.attrs.get("policy", AUTO) if config.split == AUTO else config.split
    return config.split_file or policy


def hold_out_validation(
    manifest: pd.DataFrame, label_of_site: pd.Series, fraction: float, seed: int
) -> pd.DataFrame:
    """Move a fraction of the training groups to the validation set, which chooses the best
    checkpoint.

    Groups are shuffled, sorted by their most frequent label and sampled at even distances, so that
    the labels keep their proportions. One group of each label always stays in the training set.

    Args:
        manifest: split with training and test sites.
        label_of_site: label of each site; the index is `site_id`.
        fraction: fraction of the training groups, rounded to a whole number of groups.
        seed: seed of the shuffle.

    Raises:
        InputError: no group can be held out.
    """
    train = manifest[manifest["part"] == TRAIN]
    labels = train["site_id"].map(label_of_site)
    label_of_group = labels.groupby(train["group"]).agg(lambda values: values.mode()[0])
    # A stable sort retains the random order within each label.
    shuffled = label_of_group.sample(frac=1, random_state=seed).sort_values(kind="stable")
    # `duplicated` leaves out the first group of each label, which stays in the training set.
    candidates = shuffled.index[shuffled.duplicated()]
    count = min(round(fraction * len(label_of_group)), len(candidates))
    if not count:
        raise InputError(
            f"--validation-fraction {fraction}: holds out none of {len(label_of_group)} training "
            "groups, because one "
            "group of each label is required for training. Increase it, or choose --split site."
        )
    # Centers of `count` equal intervals of the sorted list.
    chosen = candidates[(2 * np.arange(count) + 1) * len(candidates) // (2 * count)]
    part = manifest["part"].mask(
        manifest["group"].isin(chosen) & (manifest["part"] == TRAIN), VALIDATION
    )
    result = manifest.assign(part=part)
    result.attrs = dict(manifest.attrs)
    return result


def remove_sites(manifest: pd.DataFrame, site_ids: pd.Series) -> pd.DataFrame:
    """Return a manifest without some sites.

    Raises:
        InputError: train or test is empty then.
    """
    remaining = manifest[~manifest["site_id"].isin(site_ids)].reset_index(drop=True)
    require_no_overlap(remaining, "--exclude")
    return remaining


@dataclass(frozen=True)
class ManifestConfig:
    """Split a dataset into training and test sites."""

    data: tuple[Path, ...]
    """Dataset directories with the same channels."""
    out: Path
    """Split to write (.parquet or .csv), for `perturbjax train --split-file`."""
    split: AnySplit = chosen_from(SPLIT_CHOICES, AUTO, "policy")
    """Sites that stay together in the training or the test set; auto: strictest possible."""
    label_column: str = ""
    """Index column for stratification; by default the label column of the dataset."""
    folds: int = 5
    """Number of folds; one of them is the test set."""
    fold: int = 0
    """Fold of the test set, from 0."""
    seed: int = 0
    """Random seed."""
    exclude: tuple[str, ...] = SplitConfig.exclude
    """Sites to leave out: rules such as focus_DNA<-6 or Metadata_Well==A01, or files of rules."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".parquet", ".csv")
        require_fold(self.fold, self.folds)
        require_seed(self.seed)


def split_dataset(options: ManifestConfig) -> Path:
    """Split the sites of a dataset into train and test, and write the manifest.

    Returns:
        Path of the manifest.

    Raises:
        InputError: the dataset cannot be opened, has no such column, or does not allow the split.
    """
    dataset = open_dataset(options.data)
    label = dataset.column(options.label_column or dataset.label_column).name
    config = SplitConfig(
        split=options.split, folds=options.folds, fold=options.fold, exclude=options.exclude
    )
    manifest = create_manifest(dataset.index, config, label=label, seed=options.seed)
    for sentence in manifest.attrs["notes"]:
        console.print(sentence)
    write_split(manifest, options.out)
    test = (manifest["part"] == TEST).sum()
    policy = manifest.attrs["policy"]
    console.print(f"Split by {policy}: {SPLIT_POLICIES[policy].meaning}.")
    console.print(
        f"Sites: {len(manifest) - test} train, {test} test. Fingerprint: {fingerprint(manifest)}"
    )
    return options.out
