"""The jobs file of a sweep: the jobs that it defines, and the message for each kind of mistake."""

from __future__ import annotations

import pytest

from loratune.errors import ConfigError
from loratune.sweep.plan import read_plan

SHARED = 'data = ["a.jsonl"]\n'


def plan_of(tmp_path, text, **given):
    file = tmp_path / "jobs.toml"
    file.write_text(text)
    return read_plan(str(file), **({"model": "base", "out": "out"} | given))


def test_a_grid_is_every_combination_of_its_values(tmp_path):
    plan = plan_of(tmp_path, SHARED + "[grid]\nlearning_rate = [1e-4, 3e-4]\nr = [8, 64]\n")
    assert [(j.config.training.learning_rate, j.config.lora.r) for j in plan.jobs] == [
        (1e-4, 8),
        (1e-4, 64),
        (3e-4, 8),
        (3e-4, 64),
    ]
    assert [j.name for j in plan.jobs] == ["rate0.0001-r8", "rate0.0001-r64", "rate0.0003-r8", "rate0.0003-r64"]
    assert plan.jobs[3].varied == {"learning_rate": 3e-4, "r": 64}
    assert all(j.config.model == "base" and j.config.out == f"out/{j.name}" for j in plan.jobs)
    assert plan.halving is None


def test_jobs_override_shared_settings_and_the_grid_overrides_both(tmp_path):
    text = (
        SHARED + "max_steps = 50\n[lora]\nr = 4\nlora_alpha = 8\n[grid]\nseed = [0, 1]\n"
        '[[job]]\nname = "sql"\ndata = ["sql.jsonl"]\nr = 2\n'
        '[[job]]\nname = "chat"\n[job.lora]\ntarget_modules = ["q_proj"]\n'
    )
    plan = plan_of(tmp_path, text)
    assert [j.name for j in plan.jobs] == ["sql-seed0", "sql-seed1", "chat-seed0", "chat-seed1"]
    sql, chat = plan.jobs[1].config, plan.jobs[2].config
    assert (sql.data, sql.lora.r, sql.lora.lora_alpha, sql.training.seed) == (["sql.jsonl"], 2, 8, 1)
    assert (chat.data, chat.lora.r, chat.lora.target_modules) == (["a.jsonl"], 4, ["q_proj"])
    assert {j.config.training.max_steps for j in plan.jobs} == {50}


def test_settings_of_the_base_come_from_the_file_or_the_command_line(tmp_path):
    text = SHARED + 'precision = "float32"\n[grid]\nr = [1, 2]\n'
    assert {j.config.precision for j in plan_of(tmp_path, text).jobs} == {"float32"}
    assert {j.config.precision for j in plan_of(tmp_path, text, precision="bfloat16").jobs} == {"bfloat16"}


def test_a_plan_made_of_one_job_and_the_halving_section(tmp_path):
    plan = plan_of(tmp_path, SHARED + "[halving]\nat = [0.1, 0.5]\nkeep = 0.25\n[[job]]\nr = 3\n")
    assert [j.name for j in plan.jobs] == ["job"]
    assert (plan.halving.at, plan.halving.keep) == ([0.1, 0.5], 0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SHARED + "lerning_rate = 1e-4\n",
            'jobs.toml:2: unknown setting "lerning_rate". Did you mean "learning_rate"',
        ),
        (SHARED + "[gird]\nr = [1]\n", 'jobs.toml:2: unknown setting "gird". Did you mean "grid"'),
        (SHARED + "[grid]\nr = 8\n", "jobs.toml:3: r = 8: a grid lists the values to try"),
        (SHARED + "[grid]\nr = []\n", "jobs.toml:3: r = []: a grid lists"),
        (SHARED + "[grid]\nr = [8, 8]\n", "jobs.toml:3: r lists 8 twice"),
        (SHARED + "[grid]\nr = [8, 0]\n", "jobs.toml:3: r is 0; a rank is at least 1"),
        (SHARED + '[grid]\nlearning_rate = [1e-4, "x"]\n', "jobs.toml:3: learning_rate = 'x' is not a number"),
        (SHARED + "[grid]\nrank = [8]\n", 'jobs.toml:3: unknown setting "rank"'),
        (SHARED + '[grid]\ndevice = ["cpu"]\n', "jobs.toml:3: device belongs to the base model"),
        (
            SHARED + "\n[[job]]\n[[job]]\n\nseeed = 1\n",
            'jobs.toml:6: unknown setting "seeed". Did you mean "seed"',
        ),
        (SHARED + "[[job]]\n[job.lora]\nr = -1\n", "jobs.toml:4: r is -1"),
        (SHARED + '[[job]]\nprecision = "float32"\n', "jobs.toml:3: precision belongs to the base model"),
        (SHARED + 'model = "x"\n', "jobs.toml:2: model is given on the command line, as MODEL"),
        (SHARED + '[[job]]\nout = "x"\n', "jobs.toml:3: out is given on the command line, as --out"),
        (SHARED + "[lora]\nlearning_rate = 1e-3\n", 'unknown setting "learning_rate". It belongs under [training]'),
        ("[grid]\nr = [1]\n", "data is missing"),
        (SHARED + '[[job]]\nname = "a"\n[[job]]\nname = "a"\n', 'two jobs are called "a"'),
        (SHARED + '[[job]]\nname = "a/b"\n[[job]]\n', "a job cannot be called 'a/b'"),
        (SHARED + "[[job]]\nname = 3\n", "jobs.toml:3: name = 3 is not a string"),
        (SHARED + "[job]\nr = 3\n", "each headed [[job]]"),
        (SHARED + '[lora]\nbias = "all"\n', 'bias = "all": jobs share one base, so only A and B can train'),
        (SHARED + 'modules_to_save = ["lm_head"]\n', "modules_to_save: jobs share one base"),
        (SHARED + 'learning_rate = "auto"\n', 'learning_rate "auto" is itself a sweep'),
        (SHARED + 'optim = "adamw_8bit"\n', "optim is for single runs"),
        (SHARED + 'memory = "8GiB"\n', "memory is for single runs"),
        (SHARED + 'log_to = ["wandb"]\n', "log_to wandb supports one run per process"),
        (SHARED + "[halving]\nat = [0.5, 0.25]\n", "at is [0.5, 0.25]; it lists rising shares"),
        (SHARED + "[halving]\nkeep = 1.0\n", "keep is 1.0"),
        (SHARED + "[halving]\nkep = 0.5\n", 'jobs.toml:2: unknown setting "kep". Did you mean "keep"'),
        (SHARED + "eval_fraction = 0\n[halving]\n", "jobs.toml:3: halving compares held-out losses"),
        (SHARED + "[grid\n", "jobs.toml: not valid TOML"),
        ("data = 3\n", "jobs.toml:1: data = 3 is not a list"),
    ],
)
def test_an_error_gives_the_line_and_the_nearest_name(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, text)
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        read_plan(str(tmp_path / "nowhere.toml"), model="base", out="out")
