from rerail.versions import package_version


def test_a_package_that_is_not_installed_says_so():
    assert package_version("torch")[0].isdigit()
    assert package_version("no-such-package") == "not installed"
