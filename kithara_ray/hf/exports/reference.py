"""The name by which an export refers to its base."""

from kithara_ray.hf.hub_place import hub_place


def is_hub(base_name: str) -> bool:
    return base_name.startswith("hf://")


def split_reference(base_name: str) -> tuple[str, str | None]:
    """Split `hf://org/name[/folder]@revision` into (name, revision); any other handle is its own name."""
    if not is_hub(base_name):
        return base_name, None
    place = hub_place(base_name)
    return place.name, place.revision


def is_repository(name: str) -> bool:
    """True if a name without a scheme can be a name on the Hub, org/name."""
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")) and "://" not in name


def shown_name(base_name: str) -> str:
    """Return a base's name for readers elsewhere, without the directories of this host."""
    name = split_reference(base_name)[0]
    if is_hub(base_name) or "://" in name or is_repository(name):
        return name
    return name.rstrip("/").rpartition("/")[2]
