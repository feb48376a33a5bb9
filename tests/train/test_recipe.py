from __future__ import annotations

from pathlib import Path

import pytest

from fathom.errors import TrainError
from fathom.train.recipe import Recipe


def test_the_shipped_recipes_are_readable(repository):
    recipes = sorted((repository / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        recipe = Recipe.load(path)
        assert Path(recipe.data.tokenizer).is_absolute()
        assert recipe.run.minutes or recipe.run.steps
        assert all(recipe.data.tokens % length == 0 for length in recipe.data.seq_len)


def test_values_arrive_and_defaults_stay(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[data]\nseq_len = [256, 512]\ntokenizer = "t"\n[run]\nsteps = 5\n')
    recipe = Recipe.load(path)
    assert recipe.data.seq_len == (256, 512)
    assert recipe.data.tokenizer == str(tmp_path / "t")
    assert recipe.run.steps == 5
    assert recipe.run.minutes is None
    assert recipe.model.preset == "nano"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[data]\nsequence = 4\n", "unknown keys: sequence"),
        ("[extra]\n", "unknown tables: extra"),
        ('[run]\nsteps = "many"\n', "steps must be int"),
        ("[run]\nsteps = true\n", "steps must be int"),
        ("[run\n", "not valid TOML"),
        ("data = 3\n", "must be a table"),
        ("[schedule]\nsparse_start = 0.1\n", "in order"),
        ("[run]\nminutes = nan\n", "minutes is nan"),
        ("[run]\nminutes = -1\n", "minutes is -1"),
        ("[run]\nprocesses = 0\n", "processes is 0"),
        ("[data]\nworkers = -1\n", "workers from 0"),
    ],
)
def test_mistakes_are_named(tmp_path, text, match):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(TrainError, match=match):
        Recipe.load(path)


def test_a_missing_recipe_is_an_error(tmp_path):
    with pytest.raises(TrainError, match="cannot read recipe"):
        Recipe.load(tmp_path / "absent.toml")
