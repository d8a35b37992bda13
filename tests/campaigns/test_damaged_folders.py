"""A sample of the campaign on damaged folders; its own command runs all of it."""

from __future__ import annotations

from tests.campaigns import damaged_folders


def test_damaged_folders_and_kills() -> None:
    damaged = damaged_folders.run(damaged_folders.check_damage, (0, 5, 11))
    assert not damaged.faults, str(damaged)
    killed = damaged_folders.run(damaged_folders.check_kill, range(2))
    assert not killed.faults, str(killed)
