#!/bin/busybox sh
# The first process of the VM, in the initial RAM disk: finds the disk, moves what came along onto
# it, and goes on there as its first process (`on-disk`), or as the service of an init that the disk
# has (`command`). Ends by powering off, however it went.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
checkout=/root/memballoon

if [ -z "$1" ]; then
    /bin/busybox mkdir -p /proc /sys /dev /disk
    /bin/busybox mount -t devtmpfs none /dev
    /bin/busybox mount -t proc none /proc
    /bin/busybox mount -t sysfs none /sys
    for module in /modules/*.ko; do /bin/busybox insmod "$module"; done
    tries=0
    until [ -b /dev/vda ] || [ $tries -ge 200 ]; do
        /bin/busybox usleep 20000
        tries=$((tries + 1))
    done
    /bin/busybox mount -t ext4 -o noatime /dev/vda /disk
    /bin/busybox mkdir -p /disk/bed
    /bin/busybox cp -a /checkout /disk$checkout
    /bin/busybox cp -a /bin/. /disk/usr/local/bin/
    /bin/busybox cp -a /site/. /disk/usr/local/lib/python3.11/dist-packages/
    echo $checkout > /disk/usr/local/lib/python3.11/dist-packages/memballoon.pth
    /bin/busybox cp -a /init /command /disk/bed/
    /bin/busybox ip link set lo up
    for place in dev proc sys; do /bin/busybox mount --move /$place /disk/$place; done
    exec /bin/busybox switch_root /disk /bin/sh /bed/init on-disk
fi

run_command() {
    cd $checkout
    echo began > /bed/status
    # In a session of its own, as a child: what it leaves behind is nobody's but this VM's.
    HOME=/root setsid -w /bin/sh /bed/command < /dev/null > /bed/output 2> /bed/errors
    echo $? > /bed/status
    busybox poweroff -f
}

if [ "$1" = command ]; then
    run_command
fi
echo mbtest-vm > /etc/hostname
ln -sf python3 /usr/bin/python
for port in /sys/class/virtio-ports/*; do
    ln -s "/dev/${port##*/}" "/bed/$(cat "$port/name")"
done
if [ -x /lib/systemd/systemd ]; then
    # It mounts everything itself. A service is stopped when one of its processes is killed for want
    # of memory, unless told otherwise.
    cat > /etc/systemd/system/bed.service <<-end
	[Unit]
	DefaultDependencies=no
	Requires=dbus.socket
	After=dbus.socket
	[Service]
	ExecStart=/bin/sh /bed/init command
	StandardOutput=null
	OOMPolicy=continue
	TasksMax=infinity
	end
    exec /lib/systemd/systemd --unit=bed.service --show-status=no
fi
mkdir -p /dev/pts /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mount -t cgroup2 none /sys/fs/cgroup
hostname -F /etc/hostname
run_command
