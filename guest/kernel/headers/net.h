// What most files of net/ and drivers/net/ include, to be precompiled (cc.c).
#include "core.h"

#include <linux/skbuff.h>
#include <linux/netdevice.h>
#include <linux/rtnetlink.h>
#include <linux/ipv6.h>
#include <net/netlink.h>
#include <net/sock.h>
