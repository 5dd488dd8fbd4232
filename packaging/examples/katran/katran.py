#!/usr/bin/python3
"""katran.py VIP SERVER... sends SYNs of made-up clients to VIP, port 80, as Katran does: in IP-in-IP, to one
of the servers by flow, with an outer source made of the flow (create_encap_ipv4_src of Katran):
172.16, then the last two bytes of the client's address with the port in them.

  --clients NETWORK  where they are (198.51.100.0/24); --flows N how many SYNs (1000)
"""
import argparse
import ipaddress
import sys

from scapy.all import IP, TCP, L3RawSocket, conf  # Debian: python3-scapy

p = argparse.ArgumentParser(usage=__doc__)
p.add_argument("vip")
p.add_argument("servers", nargs="+")
p.add_argument("--clients", default="198.51.100.0/24", type=ipaddress.ip_network)
p.add_argument("--flows", default=1000, type=int)
o = p.parse_args()

sources = set()
s = L3RawSocket(iface=conf.iface)
for flow in range(o.flows):
    client = o.clients[1 + flow % (o.clients.num_addresses - 2)]
    port = 1024 + flow * 31 % 60000
    last = client.packed[2:]
    outer = "172.16.%d.%d" % (last[0] ^ port >> 8, last[1] ^ port & 255)
    server = o.servers[hash((int(client), port)) % len(o.servers)]
    s.send(IP(src=outer, dst=server, ttl=64) / IP(src=str(client), dst=o.vip) /
           TCP(sport=port, dport=80, flags="S", options=[("MSS", 1460)]))
    sources.add(outer)
print(len(sources), "outer sources")
sys.exit(0)
