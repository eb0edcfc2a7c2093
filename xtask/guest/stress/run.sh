#!/bin/bash
# The load of `cargo xtask stress`: runs as a service in a booted Debian, tells the serial port what came of it and
# what the kernel's log has against it, and switches the machine off.
exec </dev/null
export LC_ALL=C.UTF-8 HOME=/root
cd /root || exit 1

say() { echo "$*" >/dev/ttyS0; }

minutes=$(sed -n 's/.*stress=\([0-9]*\).*/\1/p' /proc/cmdline)
cpus=$(nproc)
say "stress-begin $cpus vCPUs, $minutes minutes, clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"

insmod torture.ko
# Processors go off-line and come back while readers and updaters of every kind run.
insmod rcutorture.ko stat_interval=60 onoff_interval=1000 onoff_holdoff=30 stutter=5 shuffle_interval=3 verbose=0 ||
    say "complaint: rcutorture.ko is not loaded"

verified=(cpu 1 vm 1 matrix 1 hash 1 qsort 1 memcpy 1 cache 1 atomic 1 crypt 1 str 1 tree 1 vecmath 1 vecfp 1 bsearch 1)
system=(switch 1 fork 1 futex 1 pipe 1 sock 1 timer 1 timerfd 1 signal 1 sigq 1 sem 1 mmap 1 fault 1 yield 1
    poll 1 eventfd 1 hdd 1 aio 1 clock 1 itimer 1 nanosleep 1 membarrier 1 clone 1)
arguments=()
set -- "${verified[@]}" "${system[@]}"
while (($#)); do
    (($2)) && arguments+=("--$1" "$2")
    shift 2
done
stress-ng --verify --metrics-brief --vm-bytes 128M --hdd-bytes 64M --timeout "${minutes}m" "${arguments[@]}" >stress-ng.log 2>&1
status=$?
say "stress-ng ended with $status"
grep -E 'fail:|error:|metrc|metrics|info: .*(passed|failed|skipped)' stress-ng.log | tail -80 >/dev/ttyS0
((status == 0)) || say "complaint: stress-ng ended with $status"

rmmod rcutorture || say "complaint: rcutorture does not end"
dmesg | grep 'rcu-torture: rtc' | tail -1 >/dev/ttyS0
dmesg | grep 'End of test' >/dev/ttyS0
dmesg | grep -q 'rcu-torture:.*End of test: SUCCESS' || say "complaint: rcutorture does not say SUCCESS"
insmod locktorture.ko torture_type=mutex_lock stat_interval=15 && sleep 30 && rmmod locktorture
dmesg | grep -q 'mutex_lock-torture:.*End of test: SUCCESS' || say "complaint: locktorture does not say SUCCESS"

clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
say "clock $clock, up $(cut -d' ' -f1 /proc/uptime) s"
dmesg | grep -E 'soft lockup|hard LOCKUP|BUG:|WARNING:|Oops|general protection|rcu.*(self-detected|detected stalls|FAILURE|!!!)|[Cc]locksource.*(unstable|skew)|blocked for more than|hogged CPU|lost .* tick|Out of memory|I/O error|EXT4-fs (error|warning)' |
    sed 's/^/complaint: /' >/dev/ttyS0
say stress-end
systemctl poweroff
