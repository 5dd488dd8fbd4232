#!/bin/sh
# ipipd_yaml converts /etc/config/ipipd to YAML: an option is a key of ipipd.yaml(5), with _ for -. The name of a section
# tunnel is the interface's; the options of the section ipipd are the process's. Values go as they are into a YAML
# string: ipipd check says what is wrong with them.
# shellcheck disable=SC2317 # config_load calls them

ipipd_key() {
	printf %s "$1" | tr _ -
}

ipipd_quoted() {
	printf "'%s'" "$(printf %s "$1" | sed "s/'/''/g")"
}

ipipd_yaml() {
	local process='' tunnels='' section='' list='' nl='
'
	config_cb() {
		section=${1:-} list=''
		[ "$section" != tunnel ] || tunnels="$tunnels  - name: $(ipipd_quoted "$2")$nl"
	}
	option_cb() {
		list=''
		case $section in
		ipipd) process="$process$(ipipd_key "$1"): $(ipipd_quoted "$2")$nl" ;;
		tunnel) tunnels="$tunnels    $(ipipd_key "$1"): $(ipipd_quoted "$2")$nl" ;;
		esac
	}
	list_cb() {
		[ "$section" = tunnel ] || return 0
		[ "$list" = "$1" ] || tunnels="$tunnels    $(ipipd_key "$1"):$nl"
		list=$1
		tunnels="$tunnels      - $(ipipd_quoted "$2")$nl"
	}
	config_load ipipd
	printf '%stunnels:%s' "$process" "${tunnels:+$nl$tunnels}"
	[ -n "$tunnels" ] || echo ' []'
}
