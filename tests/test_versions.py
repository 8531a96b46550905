from rerail.versions import version_of


def test_a_package_that_is_not_installed_says_so():
    assert version_of("torch")[0].isdigit()
    assert version_of("no-such-package") == "not installed"
