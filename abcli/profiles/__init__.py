"""Calibrated bucket sets of models: what they are, where they are stored, which come with abcli."""

from abcli.profiles.catalogue import catalogue_path, shipped
from abcli.profiles.lookup import default_profile, may_have_profile, named_profile
from abcli.profiles.profile import Difference, Evidence, Profile, Score, check_name, decode, encode, utc_now
from abcli.profiles.store import choose, export, find, import_, load, pick, profiles, remove, save, stored_path

__all__ = [
    "Difference",
    "Evidence",
    "Profile",
    "Score",
    "catalogue_path",
    "check_name",
    "choose",
    "decode",
    "default_profile",
    "encode",
    "export",
    "find",
    "import_",
    "load",
    "may_have_profile",
    "named_profile",
    "pick",
    "profiles",
    "remove",
    "save",
    "shipped",
    "stored_path",
    "utc_now",
]
