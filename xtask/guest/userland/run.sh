#!/bin/bash
# The workloads of `bench userland`: runs as a service in a booted Debian, tells the serial port how long each took
# and a checksum of what it said, and switches the machine off.
exec </dev/null
console=/dev/ttyS0
export LC_ALL=C.UTF-8 HOME=/root
cd /root || exit 1

say() { echo "$*" >$console; }

# workload NAME COMMAND...: what the command prints must be the same wherever it runs.
workload() {
    local name=$1 begin end sum
    shift
    if [[ -n $only && " $only " != *" $name "* ]]; then return; fi
    begin=$(date +%s%N)
    sum=$("$@" 2>&1 | sha256sum)
    end=$(date +%s%N)
    say "bench $name $((end - begin)) ${sum:0:16}"
}

compile() { gcc -O2 -c -o "$1" stb.c && echo compiled; }
compile_32() { gcc -m32 -O2 -c -o "$1" stb.c && gcc -m32 -O2 -o sum32 sum.c -lm && echo compiled; }
database() {
    sqlite3 :memory: "create table t(a integer primary key, b text);
        with recursive n(i) as (select 1 union all select i+1 from n where i<150000)
        insert into t select i, hex(i*i) from n; create index x on t(b); select count(*), max(b), sum(a) from t;"
}
squeeze() { tar -cf - /usr/lib/python3.13/{asyncio,email,json} | "$@" | wc -c >/dev/null; echo squeezed; }
forks() { for ((i = 0; i < 400; i++)); do /bin/true; done; echo forked; }
loop_32() { bash-static -c 'for ((i = s = 0; i < 100000; i++)); do ((s += i * 7 % 13)); done; echo $s'; }

only=$(sed -n 's/.*userland="\([^"]*\)".*/\1/p' /proc/cmdline)
say bench-init
workload systemd systemctl --failed --no-legend
workload gcc compile stb.o
workload gcc-m32 compile_32 stb32.o
workload native-32 ./sum32
workload bash-32 loop_32
workload python python3 work.py
workload perl perl -e '$_ = join(" ", map { $_ * 7919 % 10007 } 1 .. 200000); $n++ while /(\d)(\d)\2\1/g;
    %h = map { $_ => 1 } split; print "$n ", scalar(keys %h), "\n"'
workload node node work.js
workload java java Work.java
workload sqlite database
workload sha256 sh -c 'head -c 200000000 /dev/zero | sha256sum'
workload openssl sh -c 'head -c 100000000 /dev/zero | openssl enc -aes-256-ctr -K 00 -iv 00 2>/dev/null | md5sum'
workload xz squeeze xz -6
workload zstd squeeze zstd -12
workload fork forks
workload apt sh -c 'apt-get -s install vim | tail -1'
complaints=$(dmesg | grep -cE 'soft lockup|BUG:|Oops|rcu.*stall|clocksource.*unstable|segfault')
say "complaints $complaints"
say bench-end
systemctl poweroff
