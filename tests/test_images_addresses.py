"""Which addresses are of the public internet, and which no list opens."""

import pytest

from pipelines.images.addresses import allowed

PUBLIC = ["8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "192.169.0.1", "2600::1"]
PUBLIC += [
    "2a00:1450:4001:800::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "9.255.255.255",
    "11.0.0.0",
    "223.255.255.255",
]

INTERNAL = ["127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"]
INTERNAL += ["100.64.0.1", "100.100.100.200", "100.127.255.255", "::1", "fd00::1", "fc00::1", "fdff::1"]
INTERNAL += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1", "64:ff9b::7f00:1", "64:ff9b::a00:1"]

NEVER = ["0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "168.63.129.16", "192.0.0.192", "192.0.2.1"]
NEVER += ["192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"]
NEVER += ["255.255.255.255", "::", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2001::1", "2001:db8::1"]
NEVER += ["2002:7f00:1::", "2002:808:808::1", "3fff::1", "100::1", "::ffff:169.254.169.254", "::ffff:0.0.0.0"]
NEVER += ["64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "fd00:ec2::254", "fd20:ce::254", "::7f00:1", "::127.0.0.1", "4000::1"]
NEVER += ["", "localhost", "127.1", "2130706433", "1.2.3.4.5", "::g"]


@pytest.mark.parametrize("address", PUBLIC)
def test_the_public_internet(address):
    assert allowed(address, listed=False)
    assert allowed(address, listed=True)


@pytest.mark.parametrize("address", INTERNAL)
def test_an_operators_own_network_only_for_hosts_on_the_list(address):
    assert not allowed(address, listed=False)
    assert allowed(address, listed=True)


@pytest.mark.parametrize("address", NEVER)
def test_where_no_picture_is(address):
    assert not allowed(address, listed=False)
    assert not allowed(address, listed=True)
