"""What tests of the operator share; imports where the package is ops alone."""

import pytest


def each_set(sets):
    """Parametrize a test by ``names`` of normalizers, and by whether statistics are ``frozen``, where BN has any."""
    return pytest.mark.parametrize(
        'names, frozen',
        [(names, frozen) for names in sets for frozen in (False, True) if 'bn' in names or not frozen],
        ids=lambda value: '-'.join(value) if isinstance(value, tuple) else 'frozen' if value else 'batch',
    )
