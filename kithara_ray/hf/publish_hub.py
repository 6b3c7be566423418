"""A destination on the Hub: not yet."""

from kithara_ray.errors import DestinationError


def check(url):
    raise DestinationError(f"{url}: exports are not written to the hub; export locally, then `hf upload`")


def staged(url, plan, resume):
    check(url)


def put_file(local, target, name):
    check(target)
